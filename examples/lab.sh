# shellcheck shell=bash
# Three hosts from network namespaces, for the examples: source it.
#
#   client 10.91.0.2 ─┐
#   primary 10.91.0.3 ─┼─ switch       VIP 10.91.0.100 on the primary's eth0
#   standby 10.91.0.4 ─┘
#
# Names carry our process id, everything ends with the script, and a script that
# was killed leaves namespaces which the next one removes.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ftckpt=${FTCKPT:-$here/bin/ftckpt}
lab=fx$$
vip=10.91.0.100
dir=$(mktemp -d "/tmp/ftckpt-example-$$.XXXX")

say() { local us=$((${EPOCHREALTIME/./} - began)); printf '%4d.%02ds  %s\n' $((us / 1000000)) $((us % 1000000 / 10000)) "$*"; }
die() { echo "FAILED: $*" >&2; tail -n 5 "$dir"/*.err >&2 || true; exit 1; }
began=${EPOCHREALTIME/./}

[ "$(id -u)" = 0 ] || { echo "run this as root: it makes network namespaces" >&2; exit 1; }
[ -x "$ftckpt" ] || { echo "no $ftckpt: run 'make build' first" >&2; exit 1; }
for tool in ip nsenter ss redis-server; do
	command -v $tool >/dev/null || { echo "$tool is missing: run 'make deps' first" >&2; exit 1; }
done

# on HOST COMMAND...: run it on that host.
on() { local h=$1; shift; nsenter --net="/run/netns/$lab-$h" "$@"; }

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
	local end=$((SECONDS + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || die "waited too long: $what"
		sleep 0.05
	done
}

lab_down() {
	local n
	for n in client primary standby switch; do
		[ -e "/run/netns/$1-$n" ] || continue
		ip netns pids "$1-$n" | xargs -r kill -9 2>/dev/null || true
		ip netns del "$1-$n" 2>/dev/null || true
	done
}

finish() {
	local code=$?
	trap - EXIT INT TERM
	# The agents first, then the capsules, which outlive them.
	for p in ${agents:-}; do kill -9 "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done
	capsules=$(sed -n 's/.*"pid": *\([0-9]*\),.*/\1/p' "$dir"/*/capsule-*.json 2>/dev/null || true)
	for p in $capsules; do kill -9 "$p" 2>/dev/null || true; done
	lab_down $lab
	rm -rf "$dir"
	exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

for old in /run/netns/fx*-switch; do # of an example that was killed
	[ -e "$old" ] || continue
	owner=${old#/run/netns/fx}; owner=${owner%-switch}
	[ -d "/proc/$owner" ] || lab_down "fx$owner"
done

ip netns add $lab-switch
ip -n $lab-switch link add br0 type bridge stp_state 0 forward_delay 0
ip -n $lab-switch link set br0 up
i=2
for h in client primary standby; do
	ip netns add $lab-$h
	ip -n $lab-$h link set lo up
	ip -n $lab-switch link add "$h" type veth peer name eth0 netns $lab-$h
	ip -n $lab-switch link set "$h" master br0 up
	ip -n $lab-$h link set eth0 up
	ip -n $lab-$h addr add 10.91.0.$i/24 dev eth0
	i=$((i + 1))
done
ip -n $lab-primary addr add $vip/24 dev eth0

# start_pair: redis on the primary, a standby with its embedded log, protection.
start_pair() {
	mkdir -p "$dir/redis" "$dir/primary" "$dir/standby"
	on primary setsid redis-server --bind $vip --port 6379 --protected-mode no --save '' --appendonly no \
		--dir "$dir/redis" </dev/null >"$dir/redis.err" 2>&1 &
	await 10 "redis to listen" sh -c "on() { nsenter --net=/run/netns/$lab-primary \"\$@\"; }; on ss -ltn | grep -q $vip:6379"
	redis=$(ip netns pids $lab-primary | head -n 1)

	on standby "$ftckpt" standby --name redis --dev eth0 \
		--run-dir "$dir/standby" --state-dir "$dir/standby" >"$dir/standby.out" 2>"$dir/standby.err" &
	agents="$!"
	await 20 "the standby's join string" grep -q '^join: ' "$dir/standby.out"

	FTCKPT_JOIN=$(sed -n 's/^join: //p' "$dir/standby.out") \
		on primary "$ftckpt" protect --name redis --pid "$redis" --vip $vip/24 --dev eth0 --interval "${1:-1s}" \
		--run-dir "$dir/primary" --state-dir "$dir/primary" >"$dir/primary.out" 2>"$dir/primary.err" &
	agents="$agents $!"
	await 30 "the first generation" grep -q '^protected' "$dir/primary.out"
}

# status HOST FIELD: one field of ftckpt status --json, which ends with 5 as long
# as no standby has the newest generation.
status() { { "$ftckpt" status --name redis --run-dir "$dir/$1" --json || [ $? = 5 ]; } | tr -d ' \n' | grep -o "$2[^,}]*" | head -n 1 | sed 's/.*://'; }
