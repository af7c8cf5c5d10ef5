package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ftckpt/ftckpt/internal/exitcode"
)

// What cannot work is refused with one line that says why, the right status,
// and without a trace on the server.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, "")
	other := w.startLog() // of other people
	client := w.dial()

	sleeper := w.primary.Command("sleep", "1000")
	w.must(sleeper.Start())
	t.Cleanup(func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() })
	sleeperPID, err := sleeper.HostPID()
	w.must(err)

	addr := standby.join[strings.LastIndexByte(standby.join, '@'):]
	secret := func(join string) string { return join[:strings.LastIndexByte(join, '.')] }
	fingerprint := func(join string) string {
		return join[strings.LastIndexByte(join[:strings.LastIndexByte(join, '@')], '.'):strings.LastIndexByte(join, '@')]
	}
	secretOf := func(join string) string { return secret(join[:strings.LastIndexByte(join, '@')]) }

	type refusal struct {
		name string
		join string
		args []string // after those of tryProtect, and so instead of them
		code exitcode.Code
		says []string
	}
	for _, r := range []refusal{
		{"no such process", standby.join, []string{"--pid", "29999"}, exitcode.Unsuitable, []string{"29999", "no such process"}},
		{"no listener", standby.join, []string{"--pid", strconv.Itoa(sleeperPID)}, exitcode.Unsuitable, []string{"listen"}},
		{"other address", standby.join, []string{"--vip", "10.77.0.3/24"}, exitcode.Unsuitable, []string{"does not listen on 10.77.0.3"}},
		{"no such interface", standby.join, []string{"--dev", "eth7"}, exitcode.Config, []string{"eth7", "ip link"}},
		{"address elsewhere", standby.join, []string{"--dev", "lo"}, exitcode.Config, []string{vip, "lo", "ip addr add"}},
		{"damaged join string", "ftckpt1.nonsense", nil, exitcode.Config, []string{"join"}},
		{"log unreachable", secretOf(standby.join) + fingerprint(standby.join) + "@10.77.0.5:4999", nil, exitcode.Failed, []string{"10.77.0.5:4999", "unreachable"}},
		{"wrong secret", secretOf(other.join) + fingerprint(standby.join) + addr, nil, exitcode.Failed, []string{"refused", "join string"}},
		{"wrong certificate", secretOf(standby.join) + fingerprint(other.join) + addr, nil, exitcode.Failed, []string{"certificate"}},
	} {
		t.Run(r.name, func(t *testing.T) {
			w := &world{T: t, lab: w.lab, client: w.client, primary: w.primary, dir: w.dir, vips: w.vips, service: w.service, starts: w.starts + 100}
			a := w.tryProtect(redis.PID(), r.join, r.args...)
			a.exits(r.code)
			w.says(a, r.says...)
			if strings.Contains(a.said(), strings.Split(standby.join, ".")[1]) {
				t.Error("the secret was shown")
			}
			if rules := w.rules(w.primary); len(rules) != 0 {
				t.Errorf("rules: %q", rules)
			}
			w.unharmed(redis)
			w.check(client.ask(r.name))
		})
		w.starts += 200
	}
	// All that did no harm.
	w.protect(redis.PID(), standby.join)
	w.check(client.ask("protected now"))
	second := w.tryProtect(redis.PID(), standby.join)
	second.exits(exitcode.Failed)
	w.says(second, "default", "already has a daemon")
	w.check(client.ask("and still"))
}

// says fails the test if an agent's complaint lacks something.
func (w *world) says(a *agent, want ...string) {
	w.Helper()
	said := a.complaint()
	for _, s := range want {
		if !strings.Contains(said, s) {
			w.Errorf("complaint %q does not say %q", said, s)
		}
	}
}

// The address is another host's as well.
func TestAddressInUse(t *testing.T) {
	w := newWorld(t)
	redis := w.startRedis(w.primary)
	standby := w.startStandby(w.standby, "")
	w.must(w.logHost.AddAddr(vipCIDR))
	a := w.tryProtect(redis.PID(), standby.join)
	a.exits(exitcode.Config)
	w.says(a, vip, "in use", w.mac(w.logHost))
	if rules := w.rules(w.primary); len(rules) != 0 {
		t.Errorf("rules: %q", rules)
	}
	w.must(w.logHost.DelAddr(vipCIDR))
	w.unharmed(redis)
	w.protect(redis.PID(), standby.join)
}

// compile builds a C program of testdata.
func (w *world) compile(name string) string {
	w.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		w.Skip("needs a C compiler")
	}
	out := filepath.Join(w.dir, strings.TrimSuffix(name, ".c"))
	if b, err := exec.Command(cc, "-O1", "-Wall", "-Werror", "-o", out, filepath.Join("testdata", name)).CombinedOutput(); err != nil {
		w.Fatalf("compile %s: %v\n%s", name, err, b)
	}
	return out
}

// What CRIU cannot dump is named before anything is touched.
func TestUndumpable(t *testing.T) {
	if b, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); err == nil && strings.TrimSpace(string(b)) == "2" {
		t.Skip("no io_uring on this machine")
	}
	w := newWorld(t)
	uring := w.serve(w.primary, w.compile("uring.c"), vip, port)
	standby := w.startStandby(w.standby, "")
	a := w.tryProtect(uring.PID(), standby.join)
	a.exits(exitcode.Unsuitable)
	w.says(a, "io_uring")
	w.unharmed(uring)
}
