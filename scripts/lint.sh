#!/usr/bin/env bash
# Formatting and static checks. golangci-lint and shellcheck add to them where
# they are installed; without them the rest still counts.
set -euo pipefail
cd "$(dirname "$0")/.."
GO=${GO:-go}
status=0

unformatted=$(gofmt -l .)
if [ -n "$unformatted" ]; then
	printf 'lint: gofmt would change:\n%s\n' "$unformatted" >&2
	status=1
fi
"$GO" vet ./... || status=1
if command -v golangci-lint >/dev/null; then
	golangci-lint run ./... || status=1
else
	echo "lint: golangci-lint is not installed: gofmt and go vet only" >&2
fi
if command -v shellcheck >/dev/null; then
	git ls-files -z '*.sh' .ci/run | xargs -0 -r shellcheck || status=1
fi
exit "$status"
