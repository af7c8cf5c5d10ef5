# make demo, make test and make bench install what the machine lacks, so they
# want root; make build needs Go alone.

GO        ?= go
PREFIX    ?= /usr/local
DESTDIR   ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZTIME  ?= 10s
SECONDS   ?= 60
SEED      ?=
ONE       ?=

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LDFLAGS := -X main.version=$(VERSION) -X main.commit=$(COMMIT)

# git refuses to answer root about another user's clone, and the build must
# not fail for that: the version is stamped above, where it may be unknown.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

.PHONY: all build deps test demo bench growth sim lint fuzz clean install help

all: build

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

build: ## bin/ftckpt, one static program
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ftckpt ./cmd/ftckpt

deps: ## install what is missing on this machine (root)
	scripts/deps.sh runtime test criu

test: deps build ## every check and test, at most 20 minutes on two cores (root)
	GO='$(GO)' scripts/test.sh

demo: deps build ## a server's host dies and its clients do not notice (root)
	bin/ftckpt demo $(DEMO_ARGS)

bench: deps build ## what protection costs, against the same server without (root)
	$(GO) run ./e2e/bench $(BENCH_ARGS)

sim: ## the protocol in a simulator: SECONDS of schedules, or SEED=n ONE=1 to see one
	$(GO) build -o bin/simulate ./internal/sim/simulate
	bin/simulate -seconds $(SECONDS) $(if $(SEED),-seed $(SEED)) $(if $(ONE),-one)

growth: deps build ## how a takeover grows with the connections, 10 to 5000 (root)
	$(GO) run ./e2e/bench -only growth -out out/growth.json $(BENCH_ARGS)

lint: ## formatting and static checks
	GO='$(GO)' scripts/lint.sh

fuzz: ## every fuzzer for FUZZTIME
	GO='$(GO)' scripts/fuzz.sh $(FUZZTIME)

install: build ## the program and its systemd units, under DESTDIR and PREFIX
	install -D -m 0755 bin/ftckpt $(DESTDIR)$(PREFIX)/bin/ftckpt
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	for u in examples/systemd/*.service; do \
		sed 's|/usr/local/bin/|$(PREFIX)/bin/|' $$u >$(DESTDIR)$(PREFIX)/lib/systemd/system/$$(basename $$u) || exit; \
	done

clean: ## remove what make made (not what deps installed)
	rm -rf bin out
