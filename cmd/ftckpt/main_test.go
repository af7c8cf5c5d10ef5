package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// invoke runs the program with no environment but env.
func invoke(ctx context.Context, env map[string]string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs, env: func(k string) (string, bool) { v, ok := env[k]; return v, ok }}
	code = int(a.run(ctx, args))
	return code, out.String(), errs.String()
}

// The messages and exit statuses are what scripts meet; each message is one
// line that says what to do.
func TestRefusals(t *testing.T) {
	type env = map[string]string
	good := "protect --pid 4242 --vip 192.0.2.10/24 --dev lo"
	file := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(file, []byte("vip: 192.0.2.0/24\npid: 4242\ndev: lo\njoin: J\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		args string
		env  env
		code exitcode.Code
		msg  string // FILE stands for the configuration file
	}{
		{"frobnicate", nil, 2, `unknown command "frobnicate" (see "ftckpt --help")`},
		{"--frob", nil, 2, `unknown flag: --frob (see "ftckpt --help")`},
		{"help frob", nil, 2, `unknown command "frob" (see "ftckpt --help")`},
		{"help protect frob", nil, 2, `unknown command "protect frob" (see "ftckpt --help")`},
		{"status frob", nil, 2, `ftckpt status takes no argument "frob" (see "ftckpt status --help")`},
		{"status --frob", nil, 2, `unknown flag: --frob (see "ftckpt status --help")`},

		{"run -- redis-server", nil, 2, `run: this version does not have this command yet`},
		{"run --pid 7", nil, 2, `run: this version does not have this command yet`},
		{"inspect log", nil, 2, `inspect: this version does not have this command yet`},
		{good + " --join J --commit ack", nil, 2, `invalid argument "ack" for "--commit" flag: not in this version yet; it has log (see "ftckpt protect --help")`},
		{good + " --join J --commit checkpoint", nil, 2, `invalid argument "checkpoint" for "--commit" flag: not in this version yet; it has log (see "ftckpt protect --help")`},
		{good + " --join J --commit never", nil, 2, `invalid argument "never" for "--commit" flag: want log (see "ftckpt protect --help")`},
		{good + " --join J --schedule daily", nil, 3, `--schedule: "daily" is no cron expression: expected exactly 5 fields, found 1: [daily]`},
		{good + " --join J --idle-expiry 1ms", nil, 3, `--idle-expiry: 1ms is out of bounds: want 1s to 720h0m0s, or 0 for never`},
		{good + " --join J --max-replay 1ms", nil, 3, `--max-replay: 1ms is out of bounds: want 100ms to 24h0m0s, or 0 for never`},
		{"standby --dev lo --mode hot", nil, 2, `invalid argument "hot" for "--mode" flag: not in this version yet; it has cold, warm (see "ftckpt standby --help")`},

		{"protect", nil, 2, `protect needs --pid, --vip, --dev`},
		{"protect --pid 4242", env{"FTCKPT_DEV": "lo"}, 2, `protect needs --vip`},
		{good, nil, 2, `protect needs a log: --join with what "ftckpt standby" printed, or --log with the URL of a NATS server`},
		{good + " --join J --log nats://h", nil, 2, `--join and --log exclude one another`},
		{"protect --pid x", nil, 2, `invalid argument "x" for "--pid" flag: strconv.ParseInt: parsing "x": invalid syntax (see "ftckpt protect --help")`},
		{"protect --vip 192.0.2.10", nil, 2, `invalid argument "192.0.2.10" for "--vip" flag: want ADDR/LEN, as 192.0.2.10/24 or 2001:db8::10/64 (see "ftckpt protect --help")`},
		{"protect --port 70000", nil, 2, `invalid argument "70000" for "--port" flag: want a port from 1 to 65535 (see "ftckpt protect --help")`},

		{good + " --join J --port 0", nil, 3, `--port: 0 is not a port a service can have`},
		{good + " --join J --pid 1", nil, 3, `--pid: 1 is not a process that can be protected`},
		{good + " --join J --interval 1ms", nil, 3, `--interval: 1ms is out of bounds: want 100ms to 24h0m0s, or 0 for only when asked`},
		{good + " --join J --name Redis", nil, 3, `--name: "Redis" is not a service name: want 1 to 32 of a-z, 0-9, '-' and '_', a letter or a digit first`},
		{good + " --join J --dev nosuch0", nil, 3, `--dev: no interface "nosuch0" on this host (see "ip link")`},
		{good + " --join J", env{"FTCKPT_DEV": "x", "FTCKPT_INTERVAL": "-1s"}, 3, `FTCKPT_INTERVAL: -1s is out of bounds: want 100ms to 24h0m0s, or 0 for only when asked`},
		{good + " --log embed://:4222", nil, 3, `--log: a log in the primary's own process would die with it: take the join string of a standby or a logserver, or the URL of a NATS server elsewhere`},
		{"protect --config FILE", nil, 3, `FILE: vip: 192.0.2.0/24 is the network, not an address in it`},
		{"protect --config FILE", env{"FTCKPT_VIP": "127.0.0.1/8"}, 3, `FTCKPT_VIP: 127.0.0.1/8 is not an address that a service can have`},
		{"status --run-dir x", nil, 3, `--run-dir: "x" is not an absolute path`},
		{"status --config /nonexistent", nil, 3, `read configuration: open /nonexistent: no such file or directory`},
		{"status", env{"FTCKPT_LOG_FORMAT": "xml"}, 3, `FTCKPT_LOG_FORMAT: invalid value "xml": want text or json`},

		{"standby", nil, 2, `standby needs --dev`},
		{"standby --dev lo --log nats://h --join J", nil, 2, `--join and --log exclude one another`},
		{"standby --dev nosuch0", nil, 3, `--dev: no interface "nosuch0" on this host (see "ip link")`},
		{"standby --dev lo --detect 1ms", nil, 3, `--detect: 1ms is out of bounds: want 50ms to 1m0s`},
		{"standby --dev lo --log http://u:p@h", nil, 3, `--log: unknown scheme "http": want nats://HOST:PORT, tls://HOST:PORT or embed://ADDR:PORT`},
		{"logserver", nil, 2, `logserver needs --listen`},
		{"logserver --listen 4222", nil, 3, `--listen: "4222" is not ADDR:PORT`},

		{"status --run-dir /nonexistent", nil, 1, `no service runs in /nonexistent (another --run-dir?)`},
		{"status --run-dir /nonexistent --name redis", nil, 1, `service "redis" in /nonexistent: not running`},
		{"status --name ../x", nil, 3, `--name: "../x" is not a service name: want 1 to 32 of a-z, 0-9, '-' and '_', a letter or a digit first`},
		{"checkpoint --run-dir /nonexistent", nil, 1, `no service runs in /nonexistent (another --run-dir?)`},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			args := strings.Fields(strings.ReplaceAll(tt.args, "FILE", file))
			code, out, errs := invoke(t.Context(), tt.env, args...)
			if want := "ftckpt: " + strings.ReplaceAll(tt.msg, "FILE", file) + "\n"; errs != want {
				t.Errorf("standard error\n got: %swant: %s", errs, want)
			}
			if code != int(tt.code) {
				t.Errorf("exit status %d, want %d", code, tt.code)
			}
			if out != "" {
				t.Errorf("standard output %q, want none", out)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	// Help must be had whatever the settings are.
	broken := map[string]string{"FTCKPT_RUN_DIR": "x", "FTCKPT_LOG_FORMAT": "xml"}
	for _, args := range [][]string{{"--help"}, {"help"}, {"help", "protect"}, {"protect", "--help"}} {
		code, out, errs := invoke(t.Context(), broken, args...)
		if code != 0 || errs != "" || !strings.Contains(out, "Usage:") {
			t.Errorf("%q: exit status %d, stderr %q, stdout %q", args, code, errs, out)
		}
		for _, hidden := range []string{"\n  run ", "\n  inspect", "lab-host", "capsule-init"} {
			if strings.Contains(out, hidden) {
				t.Errorf("%q shows %q, which this version does not have", args, hidden)
			}
		}
	}
	code, out, errs := invoke(t.Context(), nil)
	if code != 2 || out != "" || !strings.Contains(errs, "Usage:") {
		t.Errorf("no arguments: exit status %d, stdout %q, stderr %q", code, out, errs)
	}
}

// Every command of the contract is a command here, or is refused as one that
// comes later: none is unknown.
func TestContract(t *testing.T) {
	for _, name := range []string{"check", "protect", "run", "standby", "logserver", "status", "checkpoint", "failover", "inspect", "demo", "version"} {
		if code, _, errs := invoke(t.Context(), nil, "help", name); code != 0 {
			t.Errorf("%s: exit status %d, %s", name, code, errs)
		}
	}
}

func TestRunReadsTheEnvironment(t *testing.T) {
	t.Setenv("FTCKPT_RUN_DIR", "/nonexistent/by-env")
	var out, errs bytes.Buffer
	code := run(t.Context(), []string{"status"}, &out, &errs)
	if want := "ftckpt: no service runs in /nonexistent/by-env (another --run-dir?)\n"; errs.String() != want || code != 1 {
		t.Errorf("exit status %d, stderr %q, want 1, %q", code, errs.String(), want)
	}
}

func TestEnded(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	other := errors.New("disk on fire")
	tests := []struct {
		name string
		ctx  context.Context
		err  error
		want error
	}{
		{"asked to end", over, fmt.Errorf("watch log: %w", context.Canceled), nil},
		{"asked to end, quietly", over, nil, nil},
		{"failed while ending", over, other, other},
		{"failed", t.Context(), other, other},
		{"an inner context ended", t.Context(), context.Canceled, context.Canceled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ended(tt.ctx, tt.err); !errors.Is(got, tt.want) || (got == nil) != (tt.want == nil) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	code, out, errs := invoke(t.Context(), nil, "version")
	if code != 0 || errs != "" || !strings.HasPrefix(out, "ftckpt ") || strings.Count(out, "\n") != 1 {
		t.Errorf("exit status %d, stdout %q, stderr %q", code, out, errs)
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	code, out, _ = invoke(t.Context(), nil, "version", "--json")
	var v versionInfo
	decode(t, out, &v)
	if code != 0 || v.Version == "" || v.Commit == "" || !strings.HasPrefix(v.Go, "go1.") || v.Kernel != strings.TrimSpace(string(kernel)) {
		t.Errorf("exit status %d, %+v", code, v)
	}
}
