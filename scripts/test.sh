#!/usr/bin/env bash
# test.sh [GO-TEST-ARG]...: static checks, then every test under the race
# detector. Prints go test's own lines, so that a machine can read "ok" and
# "FAIL" per package, and a summary; the whole output stays in out/test.log.
set -euo pipefail
cd "$(dirname "$0")/.."
GO=${GO:-go}
readonly LIMIT=1140 # seconds for all: with the checks, under 20 minutes

die() {
	printf 'test: error: %s\n' "$*" >&2
	exit 1
}

[ "$(id -u)" -eq 0 ] || die "the tests make network namespaces, packet filters and checkpoints: run this as root (sudo make test)"
command -v "$GO" >/dev/null || die "no go in PATH: install Go 1.26 or newer (with sudo, try: sudo env \"PATH=\$PATH\" make test)"

begin=$SECONDS
mkdir -p out
scripts/lint.sh

race=-race
if ! command -v "$("$GO" env CC)" >/dev/null; then
	echo "test: warning: no C compiler, which the race detector needs: testing without it" >&2
	race=
fi

# The tests share two cores, kernel tables and a clock: one package at a time.
# Building is what can be done in parallel, so do it before.
"$GO" build $race ./...
set +e
timeout --kill-after=30 $((LIMIT - (SECONDS - begin))) \
	"$GO" test $race -p 1 -count=1 -timeout 15m "$@" ./... 2>&1 | tee out/test.log
status=${PIPESTATUS[0]}
set -e

passed=$(grep -c '^ok ' out/test.log || true)
failed=$(grep -c '^FAIL[[:space:]]' out/test.log || true)
printf '\ntest: %d packages passed, %d failed, %d seconds\n' "$passed" "$failed" $((SECONDS - begin))
[ "$status" -ne 124 ] || printf 'test: cut off after %d seconds\n' "$LIMIT"
if [ "$status" -ne 0 ]; then
	grep -E '^[[:space:]]*--- FAIL|^FAIL[[:space:]]|^panic:|WARNING: DATA RACE' out/test.log | sort -u | sed 's/^/test:   /' || true
	echo 'test: FAILED; all of it is in out/test.log'
	exit 1
fi
echo 'test: PASSED'
