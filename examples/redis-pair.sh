#!/bin/bash
# A redis pair: a client counts on one TCP connection while redis is killed and
# the other host takes over. Checks itself: exit 0 only if every reply is right
# and the connection is the same from beginning to end.
. "$(dirname "$0")/lab.sh"

start_pair 1s
say "redis (pid $redis) is protected at $vip"

# One connection, never opened again: a reset ends the loop with an error.
cat >"$dir/client.sh" <<'C'
exec 3<>/dev/tcp/$1/6379
n=0 longest=0
while [ ! -e "$2/stop" ]; do
	before=${EPOCHREALTIME/./}
	printf 'INCR counter\r\n' >&3
	IFS= read -r -t 30 -u 3 reply || { echo "no reply after $n"; exit 1; }
	n=$((n + 1))
	[ "$reply" = ":$n"$'\r' ] || { echo "reply $n is '$reply'"; exit 1; }
	waited=$((${EPOCHREALTIME/./} - before))
	[ $waited -le $longest ] || longest=$waited
	echo $n >"$2/count"
done
echo "$n replies, all right; the longest took $((longest / 1000)) ms"
C
on client bash "$dir/client.sh" "$vip" "$dir" >"$dir/client.out" 2>"$dir/client.err" &
client=$!

counted() { [ "$(cat "$dir/count" 2>/dev/null || echo 0)" -gt "$1" ]; }
await 10 "the client to count" counted 50
first=$(status primary '"generation":{"id"')
newer() { [ "$(status primary '"generation":{"id"')" -gt $((first + 1)) ]; }
await 20 "a generation that has the client" newer
say "the client's connection is in generation $(status primary '"generation":{"id"')"

kill -9 "$redis"
at=$(cat "$dir/count")
say "killed redis with kill -9 at count $at"
await 30 "the client to count on" counted $((at + 200))
say "the client counts on: $(cat "$dir/count")"
touch "$dir/stop"
wait $client || die "client: $(cat "$dir/client.out")"
say "$(cat "$dir/client.out")"
[ "$(status standby '"role"')" = '"primary"' ] || die "the standby is not the primary"
say "the standby is the primary now: epoch $(status standby '"epoch"')"
echo OK
