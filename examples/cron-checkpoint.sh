#!/bin/bash
# Runs the line of examples/crontab as cron would (sh, no terminal, a bare
# environment) against a protected redis, and checks that it made a generation.
. "$(dirname "$0")/lab.sh"

start_pair 1h
before=$(status primary '"generation":{"id"')
say "protected; generation $before"

line=$(grep -v '^#' "$here/examples/crontab" | sed -E 's/^([^ ]+ +){5}[^ ]+ +//')
[ -n "$line" ] || die "no line in examples/crontab"
mkdir "$dir/bin"
cat >"$dir/bin/ftckpt" <<W
#!/bin/sh
exec "$ftckpt" "\$@" --run-dir "$dir/primary"
W
printf '#!/bin/sh\ncat >"%s/logged"\n' "$dir" >"$dir/bin/logger"
chmod +x "$dir/bin/ftckpt" "$dir/bin/logger"
say "cron runs: $line"
env -i PATH="$dir/bin:/usr/bin:/bin" /bin/sh -c "$line" </dev/null || die "the cron line failed"
say "it said: $(cat "$dir/logged")"
after=$(status primary '"generation":{"id"')
[ "$after" -gt "$before" ] || die "generation is still $after"
say "generation $after is stable"
echo OK
