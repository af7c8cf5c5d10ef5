#!/usr/bin/env bash
# fuzz.sh TIME: runs every fuzzer of the module for TIME, one after the other
# (go test runs only one at a time).
set -euo pipefail
cd "$(dirname "$0")/.."
GO=${GO:-go}
time=${1:-10s}
status=0
count=0

while read -r pkg; do
	# A package whose tests do not build is a finding, not one without fuzzers.
	listed=$("$GO" test -list '^Fuzz' "$pkg") || {
		printf '%s\n' "$listed" >&2
		status=1
		continue
	}
	for f in $(grep '^Fuzz' <<<"$listed" || true); do
		count=$((count + 1))
		printf 'fuzz: %s %s for %s\n' "$pkg" "$f" "$time"
		"$GO" test -run '^$' -fuzz "^$f\$" -fuzztime "$time" "$pkg" || status=1
	done
done < <("$GO" list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./...)

if [ "$count" -eq 0 ]; then
	echo "fuzz: found no fuzzer" >&2
	exit 1
fi
printf 'fuzz: %d fuzzers, %s\n' "$count" "$([ $status -eq 0 ] && echo 'no finding' || echo 'FINDINGS')"
exit "$status"
