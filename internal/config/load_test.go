package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/remote"
)

// load parses args as the flags of protect, then env and the file, whose
// content is given, as the command does.
func load(t *testing.T, args []string, env map[string]string, file string) (Protect, *Origins, error) {
	t.Helper()
	var p Protect
	fs := pflag.NewFlagSet("protect", pflag.ContinueOnError)
	p.Common.Flags(fs)
	p.Flags(fs)
	if file != "" {
		path := filepath.Join(t.TempDir(), "f.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	if err := fs.Parse(args); err != nil {
		t.Fatalf("parse %q: %v", args, err)
	}
	known := func(k string) bool { return fs.Lookup(k) != nil || k == "detect" }
	o, err := Load(fs, known, func(k string) (string, bool) { v, ok := env[k]; return v, ok })
	p.File = ""
	return p, o, err
}

func defaults() Protect {
	return Protect{
		Common:    Common{RunDir: DefaultRunDir, StateDir: DefaultStateDir, LogFormat: LogFormatText},
		Name:      DefaultName,
		Interval:  DefaultInterval,
		Commit:    CommitLog,
		OnCrash:   OnCrashFailover,
		Fenced:    FencedStop,
		MaxReplay: DefaultMaxReplay,
	}
}

func TestPrecedence(t *testing.T) {
	tests := []struct {
		name string
		args []string
		env  map[string]string
		file string
		want func(*Protect)
	}{
		{"defaults", nil, nil, "", func(*Protect) {}},
		{"file over default", nil, nil, "name: f\ninterval: 3s\n", func(p *Protect) { p.Name, p.Interval = "f", 3*time.Second }},
		{"env over file", nil, map[string]string{"FTCKPT_NAME": "e"}, "name: f\ninterval: 3s\n",
			func(p *Protect) { p.Name, p.Interval = "e", 3*time.Second }},
		{"flag over env over file", []string{"--name=a"}, map[string]string{"FTCKPT_NAME": "e", "FTCKPT_DEV": "e0"}, "name: f\ndev: f0\ncommit: log\n",
			func(p *Protect) { p.Name, p.Dev = "a", "e0" }},
		{"a flag set to its default still wins", []string{"--interval=10s"}, map[string]string{"FTCKPT_INTERVAL": "1m"}, "", func(*Protect) {}},
		{"empty env is none", nil, map[string]string{"FTCKPT_NAME": ""}, "name: f", func(p *Protect) { p.Name = "f" }},
		{"dashes become underscores", nil, map[string]string{"FTCKPT_RUN_DIR": "/r", "FTCKPT_LOG_FORMAT": "json"}, "state-dir: /s",
			func(p *Protect) { p.RunDir, p.LogFormat, p.StateDir = "/r", "json", "/s" }},
		{"bool in the file", nil, nil, "verbose: true", func(p *Protect) { p.Verbose = true }},
		{"list in the file", nil, nil, "port: [6379, 6380]", func(p *Protect) { p.Ports = []uint16{6379, 6380} }},
		{"block list in the file", nil, nil, "port:\n  - 1\n  - 65535\n", func(p *Protect) { p.Ports = []uint16{1, 65535} }},
		{"scalar for a list", nil, nil, "port: 6379", func(p *Protect) { p.Ports = []uint16{6379} }},
		{"peers in the file", nil, nil, "outgoing: [192.0.2.7:5432, 198.51.100.0/24]", func(p *Protect) {
			p.Outgoing = []remote.Range{{Net: netip.MustParsePrefix("192.0.2.7/32"), Port: 5432}, {Net: netip.MustParsePrefix("198.51.100.0/24")}}
		}},
		{"peers in the environment", nil, map[string]string{"FTCKPT_OUTGOING": "192.0.2.7, 192.0.2.8/32:1"}, "outgoing: [192.0.2.9]", func(p *Protect) {
			p.Outgoing = []remote.Range{{Net: netip.MustParsePrefix("192.0.2.7/32")}, {Net: netip.MustParsePrefix("192.0.2.8/32"), Port: 1}}
		}},
		{"peers are replaced, not joined", []string{"--outgoing=192.0.2.1", "--outgoing=192.0.2.2"}, nil, "outgoing: [192.0.2.9]", func(p *Protect) {
			p.Outgoing = []remote.Range{{Net: netip.MustParsePrefix("192.0.2.1/32")}, {Net: netip.MustParsePrefix("192.0.2.2/32")}}
		}},
		{"list in the environment", nil, map[string]string{"FTCKPT_PORT": "1,2, 3"}, "port: [9]", func(p *Protect) { p.Ports = []uint16{1, 2, 3} }},
		{"lists are replaced, not joined", []string{"--port=1", "--port=2"}, map[string]string{"FTCKPT_PORT": "3"}, "port: [9]",
			func(p *Protect) { p.Ports = []uint16{1, 2} }},
		{"prefix", nil, map[string]string{"FTCKPT_VIP": "192.0.2.7/24"}, "pid: 0x10",
			func(p *Protect) { p.VIPs, p.PID = []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24")}, 16 }},
		{"prefixes in the file", nil, nil, "vip: [192.0.2.7/24, 2001:db8::7/64]\nclient-net: 10.0.0.0/8", func(p *Protect) {
			p.VIPs = []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24"), netip.MustParsePrefix("2001:db8::7/64")}
			p.Clients = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		}},
		{"prefixes in the environment", nil, map[string]string{"FTCKPT_VIP": "192.0.2.7/24, 2001:db8::7/64", "FTCKPT_CLIENT_NET": "2001:db8::/32"}, "vip: 192.0.2.9/24",
			func(p *Protect) {
				p.VIPs = []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24"), netip.MustParsePrefix("2001:db8::7/64")}
				p.Clients = []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}
			}},
		{"repeated prefixes", []string{"--vip=192.0.2.7/24", "--vip=192.0.2.8/24"}, nil, "", func(p *Protect) {
			p.VIPs = []netip.Prefix{netip.MustParsePrefix("192.0.2.7/24"), netip.MustParsePrefix("192.0.2.8/24")}
		}},
		{"a key of another command", nil, nil, "detect: 1s\nname: f", func(p *Protect) { p.Name = "f" }},
		{"empty file", nil, nil, "# nothing\n", func(*Protect) {}},
		{"null document", nil, nil, "---\n~\n", func(*Protect) {}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := load(t, tt.args, tt.env, tt.file)
			if err != nil {
				t.Fatal(err)
			}
			want := defaults()
			tt.want(&want)
			if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
				t.Errorf("settings (-want +got):\n%s", d)
			}
		})
	}
}

func TestLoadErrors(t *testing.T) {
	tests := []struct {
		name string
		env  map[string]string
		file string
		want string // FILE stands for its path
	}{
		{"bad env", map[string]string{"FTCKPT_INTERVAL": "soon"}, "", `FTCKPT_INTERVAL: invalid value "soon": time: invalid duration "soon"`},
		{"env of a later version", map[string]string{"FTCKPT_COMMIT": "ack"}, "", `FTCKPT_COMMIT: invalid value "ack": not in this version yet; it has log`},
		{"bad value in the file", nil, "name: a\npid: many\n", `FILE: line 2: pid: invalid value "many": strconv.ParseInt: parsing "many": invalid syntax`},
		{"bad choice", nil, "on-crash: never", `FILE: line 1: on-crash: invalid value "never": want failover or local`},
		{"unknown key", nil, "name: a\nprot: 1\n", `FILE: line 2: unknown key "prot" (keys are the names of the flags)`},
		{"env name as key", nil, "run_dir: /x", `FILE: line 1: unknown key "run_dir" (keys are the names of the flags)`},
		{"the file names a file", nil, "config: /x", `FILE: line 1: unknown key "config" (keys are the names of the flags)`},
		{"twice", nil, "name: a\nname: b\n", `read configuration: FILE: line 2: key "name" is given twice`},
		{"no value", nil, "name:\n", `read configuration: FILE: line 1: key "name" has no value`},
		{"empty list", nil, "port: []\n", `read configuration: FILE: line 1: key "port" has no value`},
		{"list for a scalar", nil, "name: [a, b]", `FILE: line 1: name: takes one value, not a list`},
		{"nested", nil, "name: {a: b}", `read configuration: FILE: line 1: key "name" must be a value or a list of values`},
		{"alias", nil, "name: &x a\ndev: *x\n", `read configuration: FILE: line 2: key "dev" must be a value or a list of values`},
		{"not a mapping", nil, "- a\n- b\n", `read configuration: FILE: line 1: want a mapping of keys to values`},
		{"two documents", nil, "name: a\n---\nname: b\n", `read configuration: FILE: more than one YAML document`},
		{"not YAML", nil, "name: [a", `read configuration: FILE: yaml: line 1: did not find expected ',' or ']'`},
		{"too large", nil, "# " + strings.Repeat("x", maxFile), `read configuration: FILE is larger than 1048576 bytes`},
		{"missing file", map[string]string{"FTCKPT_CONFIG": "/nonexistent/f"}, "", `read configuration: open /nonexistent/f: no such file or directory`},
		{"device as file", map[string]string{"FTCKPT_CONFIG": "/dev/zero"}, "", `read configuration: /dev/zero is not a regular file`},
		{"directory as file", map[string]string{"FTCKPT_CONFIG": "/"}, "", `read configuration: / is not a regular file`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := load(t, nil, tt.env, tt.file)
			if err == nil {
				t.Fatal("no error")
			}
			got := err.Error()
			if i := strings.Index(got, "/f.yaml"); i >= 0 {
				j := strings.LastIndex(got[:i], " ") + 1
				got = got[:j] + "FILE" + got[i+len("/f.yaml"):]
			}
			if got != tt.want {
				t.Errorf("error\n got: %s\nwant: %s", got, tt.want)
			}
			if c := exitcode.Of(err); c != exitcode.Config {
				t.Errorf("exit status %d, want %d", c, exitcode.Config)
			}
		})
	}
}

func TestPipeAsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := load(t, nil, map[string]string{"FTCKPT_CONFIG": path}, "")
	if err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Errorf("error %v, want one about a regular file", err)
	}
}

func TestExclusive(t *testing.T) {
	const joinFile = "join: J"
	tests := []struct {
		name      string
		args      []string
		env       map[string]string
		file      string
		join, log string
		code      exitcode.Code
		msg       string
	}{
		{name: "one alone", args: []string{"--log=nats://h"}, log: "nats://h"},
		{name: "both flags", args: []string{"--log=nats://h", "--join=J"}, code: exitcode.Usage, msg: "--join and --log exclude one another"},
		{name: "both env", env: map[string]string{"FTCKPT_LOG": "nats://h", "FTCKPT_JOIN": "J"}, code: exitcode.Config, msg: "FTCKPT_JOIN and FTCKPT_LOG exclude one another"},
		{name: "flag displaces file", args: []string{"--log=nats://h"}, file: joinFile, log: "nats://h"},
		{name: "env displaces file", env: map[string]string{"FTCKPT_LOG": "nats://h"}, file: joinFile, log: "nats://h"},
		{name: "flag displaces env", args: []string{"--join=K"}, env: map[string]string{"FTCKPT_LOG": "nats://h"}, join: "K"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, o, err := load(t, tt.args, tt.env, tt.file)
			if err != nil {
				t.Fatal(err)
			}
			// p was copied before the reset: look at the flags themselves.
			err = o.Exclusive("join", "log")
			if exitcode.Of(err) != tt.code || exitcode.Message(err) != tt.msg {
				t.Fatalf("got %d %q, want %d %q", exitcode.Of(err), exitcode.Message(err), tt.code, tt.msg)
			}
			if err != nil {
				return
			}
			join, log := o.fs.Lookup("join").Value.String(), o.fs.Lookup("log").Value.String()
			if join != tt.join || log != tt.log {
				t.Errorf("join %q, log %q; want %q, %q (loaded %+v)", join, log, tt.join, tt.log, p)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "name: a", "port: [1, 2]", "a: &x b\nc: *x", "? [a]\n: b", "--- !!map\n<<: {a: b}", "a:\n  - b:\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		settings, err := parse(data)
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, s := range settings {
			if seen[s.key] || len(s.values) == 0 {
				t.Errorf("setting %+v is double or empty", s)
			}
			seen[s.key] = true
		}
	})
}
