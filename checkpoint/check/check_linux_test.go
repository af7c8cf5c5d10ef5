package check

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/checkpoint/internal/sandbox"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("these tests dump and restore for real: run them as root")
	}
}

// The machine that runs the tests can do all of it.
func TestHost(t *testing.T) {
	needRoot(t)
	all := Host(t.Context(), Options{StateDir: "/var/lib/ftckpt/not/there"})
	if len(all) != len(probes) {
		t.Fatalf("%d answers to %d questions", len(all), len(probes))
	}
	for _, r := range all {
		t.Logf("%-18s %-12s %s", r.Name, r.State, r.Detail)
		if r.State != Works && !r.Optional {
			t.Errorf("%s: %s: %s: %s", r.Name, r.State, r.Detail, r.Remedy)
		}
		if (r.Remedy == "") != (r.State == Works) {
			t.Errorf("%s: %s with remedy %q", r.Name, r.State, r.Remedy)
		}
	}
	if !Ready(all) {
		t.Error("not ready")
	}
}

func TestHostWithoutCriu(t *testing.T) {
	needRoot(t)
	byName := map[string]Requirement{}
	all := Host(t.Context(), Options{Criu: "/nonexistent/criu", StateDir: "/"})
	for _, r := range all {
		byName[r.Name] = r
	}
	if r := byName["criu"]; r.State != Missing || !strings.Contains(r.Remedy, "deps.sh") {
		t.Errorf("%+v", r)
	}
	if r := byName["dump and restore"]; r.State != Unknown {
		t.Errorf("%+v", r)
	}
	if Ready(all) {
		t.Error("ready without criu")
	}
	old := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(old, []byte("#!/bin/sh\necho Version: 4.1.1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s, d := probeCriu(t.Context(), Options{Criu: old}); s != Missing || !strings.Contains(d, "4.1.1 is older than 4.2.0") {
		t.Errorf("an old criu: %s, %s", s, d)
	}
}

func TestHostGivesUp(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, r := range Host(ctx, Options{StateDir: "/"}) {
		if r.State != Unknown {
			t.Errorf("%s: %s after the context ended", r.Name, r.State)
		}
	}
}

func start(t *testing.T, hold ...string) (s *sandbox.Sandbox, pid int) {
	t.Helper()
	needRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := sandbox.Start(ctx, sandbox.Options{Hold: hold})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	if pid, err = checkpoint.OuterPID(s.TargetPID, s.InitPID); err != nil {
		t.Fatal(err)
	}
	return s, pid
}

// What InspectTarget says agrees with what CRIU does.
func TestInspectTargetAgreesWithCriu(t *testing.T) {
	needRoot(t)
	c, err := checkpoint.Locate(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []struct {
		hold, kind string
		dumps      bool // CRIU does not notice, but no other host could restore it
	}{
		{"child", "", true}, {"pidfd_self", "", true},
		{"io_uring", "io_uring", false}, {"userfaultfd", "userfaultfd", false}, {"perf_event", "perf_event", false},
		{"bpf", "bpf", false}, {"memfd_secret", "memfd_secret", false}, {"pidfd", "pidfd", false}, {"vsock", "vsock", false},
		{"sysvshm", "SysV shared memory", false}, {"pidns", "nested PID namespace", false}, {sandbox.MPTCP, "mptcp", false},
		{"unix_stream", "unix socket", false}, {"tty", "terminal", true},
	} {
		t.Run(k.hold, func(t *testing.T) {
			_, pid := start(t, k.hold)
			r, err := InspectTarget(pid)
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, p := range r.Problems {
				if p.Kind == k.kind {
					found = true
					if p.Remedy == "" || p.Detail == "" {
						t.Errorf("%+v says too little", p)
					}
				} else if k.hold != sandbox.MPTCP { // which leaves no TCP listener
					t.Errorf("unexpected: %s", p)
				}
			}
			if found != (k.kind != "") {
				t.Errorf("problems %v, want %q", r.Problems, k.kind)
			}
			if err := r.Err(); (err != nil) != (k.kind != "") || err != nil && !errors.Is(err, ErrNotProtected) {
				t.Errorf("error %v", err)
			}
			dir, err := os.MkdirTemp("/dev/shm", "ftckpt-test-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			_, err = c.Dump(t.Context(), checkpoint.DumpRequest{PID: pid, Dir: dir + "/image"})
			if (err == nil) != k.dumps {
				t.Errorf("criu: %v", err)
			}
		})
	}
}

func TestInspectTargetOfAServer(t *testing.T) {
	s, pid := start(t, "child")
	r, err := InspectTarget(pid)
	if err != nil || r.Err() != nil {
		t.Fatal(err, r.Err())
	}
	want := netip.MustParseAddrPort("127.0.0.1:7")
	if len(r.Listeners) != 1 || r.Listeners[0].Addr != want || r.Listeners[0].PID != pid || r.Processes != 2 {
		t.Errorf("%+v", r)
	}
	if exe, _ := os.Executable(); r.Exe != exe {
		t.Errorf("program %s, want %s", r.Exe, exe)
	}
	// Traced by somebody else.
	if err := traced(pid, func() {
		r, err := InspectTarget(pid)
		if err != nil || len(r.Problems) != 1 || r.Problems[0].Kind != "traced" {
			t.Errorf("a traced target: %v, %v", r.Problems, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Exchange(t.Context(), func() int { n, _ := s.Dial(t.Context(), sandbox.Echo); return n }()); err != nil {
		t.Errorf("the target suffered: %v", err)
	}
}

// traced runs f while pid is seized by a thread of ours, which does not stop it.
func traced(pid int, f func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ptrace := func(request uintptr) error {
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, request, uintptr(pid), 0, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}
	if err := ptrace(unix.PTRACE_SEIZE); err != nil {
		return err
	}
	f()
	// Only a stopped tracee can be let go of.
	if err := ptrace(unix.PTRACE_INTERRUPT); err != nil {
		return err
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		return err
	}
	return ptrace(unix.PTRACE_DETACH)
}

func TestInspectTargetRefuses(t *testing.T) {
	needRoot(t)
	if _, err := InspectTarget(1 << 30); !errors.Is(err, checkpoint.ErrNoProcess) {
		t.Errorf("no process: %v", err)
	}
	r, err := InspectTarget(os.Getpid())
	if err != nil || r.Err() == nil || r.Problems[0].Kind != "own process" {
		t.Errorf("ourselves: %v, %v", r.Problems, err)
	}
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	r, err = InspectTarget(cmd.Process.Pid)
	if err != nil || len(r.Problems) == 0 || r.Problems[len(r.Problems)-1].Kind != "no listener" {
		t.Errorf("no listener: %v, %v", r.Problems, err)
	}
}

// A user may not look at root's process.
func TestInspectTargetOfAnother(t *testing.T) {
	needRoot(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A copy that the user nobody can reach: the test binary is in root's directory.
	dir, err := os.MkdirTemp("/dev/shm", "ftckpt-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/test", b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/test", "-test.run", "^TestAsNobody$", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "FTCKPT_TEST_NOBODY=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestAsNobody") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestAsNobody is run by TestInspectTargetOfAnother.
func TestAsNobody(t *testing.T) {
	if os.Getenv("FTCKPT_TEST_NOBODY") == "" {
		t.Skip("only as a child of TestInspectTargetOfAnother")
	}
	if _, err := InspectTarget(1); !errors.Is(err, ErrNotOurs) {
		t.Errorf("another's process: %v", err)
	}
	byName := map[string]Requirement{}
	for _, r := range Host(t.Context(), Options{StateDir: "/"}) {
		byName[r.Name] = r
	}
	for name, want := range map[string]State{
		"privileges": Missing, "namespaces": Unknown, "dump and restore": Unknown, "iptables NFQUEUE": Unknown,
		"raw socket": Unknown, "packet socket": Unknown, "macvlan": Unknown, "/dev/shm": Works,
	} {
		if r := byName[name]; r.State != want {
			t.Errorf("%s: %s (%s), want %s", name, r.State, r.Detail, want)
		}
	}
}

func TestParseListener(t *testing.T) {
	for line, want := range map[string]string{
		"   0: 0100007F:0007 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0":                                    "127.0.0.1:7",
		"   1: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1": "[::1]:8080",
		"   1: 0000000000000000FFFF00000100000A:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1": "10.0.0.1:8080",
	} {
		addr, inode, ok := parseListener(line)
		if !ok || addr.String() != want || inode != 4711 {
			t.Errorf("%q: %v %d %v, want %s", line, addr, inode, ok, want)
		}
	}
	for _, line := range []string{"", "sl local", "0: 0100007F:0007 00000000:0000 01 0 0 0 0 0 4711", "0: XX:0007 0 0A 0 0 0 0 0 4711"} {
		if _, _, ok := parseListener(line); ok {
			t.Errorf("%q listens", line)
		}
	}
}

func TestParseConnection(t *testing.T) {
	const up = "   1: 6401A8C0:9C42 0701A8C0:18EB 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0000000000000000 20 4 30 10 -1"
	c, inode, ok := parseConnection(up)
	if !ok || inode != 4242 || c.Local.String() != "192.168.1.100:40002" || c.Remote.String() != "192.168.1.7:6379" {
		t.Errorf("%+v, inode %d, %v", c, inode, ok)
	}
	if want := "--outgoing 192.168.1.7/32:6379"; !strings.HasSuffix(c.Remedy(), want) {
		t.Errorf("remedy %q, want %q", c.Remedy(), want)
	}
	for _, line := range []string{"", "  sl  local_address rem_address   st",
		strings.Replace(up, " 01 ", " 0A ", 1), strings.Replace(up, " 01 ", " 06 ", 1), strings.Replace(up, "0701A8C0", "0701A8C", 1), strings.Replace(up, ":18EB", "", 1)} {
		if c, _, ok := parseConnection(line); ok {
			t.Errorf("%q is %+v", line, c)
		}
	}
}
