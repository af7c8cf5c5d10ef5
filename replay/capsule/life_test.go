package capsule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// agentRole starts a capsule, with a process inside if asked to, says who PID 1
// is and waits to be killed. arg: RUNDIR empty|occupied
func agentRole(arg string) error {
	dir, how, _ := strings.Cut(arg, " ")
	c, err := Start(context.Background(), Options{Name: "svc", RunDir: dir})
	if err != nil {
		return err
	}
	if how == "occupied" {
		if err := c.Command("setsid", "sleep", "1000").Start(); err != nil {
			return err
		}
		for deadline := time.Now().Add(5 * time.Second); !sleeps(c.InitPID()); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				return errors.New("sleep did not start")
			}
		}
	}
	fmt.Println(c.InitPID())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// sleeps reports whether a sleep runs in the capsule of init.
func sleeps(init int) bool {
	_, ok := sleeper(init)
	return ok
}

func sleeper(init int) (pid int, ok bool) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", init))
	if err != nil {
		return 0, false
	}
	for _, p := range members(ns) {
		if comm, _ := os.ReadFile("/proc/" + p + "/comm"); strings.TrimSpace(string(comm)) == "sleep" {
			pid, err = strconv.Atoi(p)
			return pid, err == nil
		}
	}
	return 0, false
}

// killedAgent starts an agent, lets it start a capsule, and kills it.
func killedAgent(t *testing.T, dir, how string) identity {
	t.Helper()
	needRoot(t)
	agent := roleCommand(t, "agent "+dir+" "+how)
	stdin, err := agent.StdinPipe() // so that it ends with this test
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	init, err := strconv.Atoi(startLine(t, agent))
	if err != nil {
		t.Fatal(err)
	}
	id, err := identify(init)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := CleanupStale(dir, "svc"); err != nil {
			t.Error(err)
		}
	})
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	return id
}

func ended(id identity) func() bool {
	return func() bool { return !alive(id.PID) && len(members(id.PIDNS)) == 0 }
}

func TestEmptyCapsuleEndsWithItsAgent(t *testing.T) {
	dir := t.TempDir()
	id := killedAgent(t, dir, "empty")
	eventually(t, 5*time.Second, "the empty capsule ends", ended(id))
	if _, err := Adopt(dir, "svc"); !errors.Is(err, ErrNoCapsule) {
		t.Errorf("adopt what has ended: %v", err)
	}
	if err := CleanupStale(dir, "svc"); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestOccupiedCapsuleOutlivesItsAgent(t *testing.T) {
	dir := t.TempDir()
	id := killedAgent(t, dir, "occupied")
	for range 5 { // PID 1 looks every orphanPoll whether it may end
		time.Sleep(orphanPoll)
		if !sleeps(id.PID) {
			t.Fatal("the service died with its agent")
		}
	}
	if _, err := Start(t.Context(), Options{Name: "svc", RunDir: dir}); !errors.Is(err, ErrExists) {
		t.Fatalf("a second capsule of the name: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "capsule-svc.json")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("state file: %v, %v", fi.Mode(), err)
	}

	c, err := Adopt(dir, "svc")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.InitPID() != id.PID {
		t.Errorf("adopted %d, want %d", c.InitPID(), id.PID)
	}
	if empty, err := c.Empty(); empty || err != nil {
		t.Errorf("with a service inside it is said to be empty: %v, %v", empty, err)
	}
	// It has an agent again, so it stays when it becomes empty.
	pid, _ := sleeper(id.PID)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "sleep ends", func() bool { return !sleeps(id.PID) })
	for range 5 {
		time.Sleep(orphanPoll)
		if !alive(id.PID) {
			t.Fatal("an adopted capsule ended because it was empty")
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !ended(id)() {
		t.Errorf("after Close there are %v", members(id.PIDNS))
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	<-c.Done()
}

// Without an agent the capsule ends as soon as the service does.
func TestOrphanEndsWithItsService(t *testing.T) {
	id := killedAgent(t, t.TempDir(), "occupied")
	pid, ok := sleeper(id.PID)
	if !ok {
		t.Fatal("the service died with its agent")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "the capsule ends", ended(id))
}

func TestCleanupStaleKillsTheLiving(t *testing.T) {
	dir := t.TempDir()
	id := killedAgent(t, dir, "occupied")
	if err := CleanupStale(dir, "svc"); err != nil {
		t.Fatal(err)
	}
	if !ended(id)() {
		t.Errorf("left: %v", members(id.PIDNS))
	}
}

// A state file whose PID is another process's now must not get that one killed.
func TestCleanupStaleSparesStrangers(t *testing.T) {
	needRoot(t)
	stranger := exec.Command("sleep", "100")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stranger.Process.Kill(); _ = stranger.Wait() })
	right, err := identify(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*identity){
		"start time":    func(i *identity) { i.StartTime++ },
		"boot":          func(i *identity) { i.BootID = "x" },
		"pid namespace": func(i *identity) { i.PIDNS = "pid:[1]" },
	} {
		dir := t.TempDir()
		st := state{Version: stateVersion, Name: "svc", identity: right, VIPDev: "vip0", PIDMax: 32768}
		change(&st.identity)
		path, _ := statePath(dir, "svc")
		if err := st.write(path); err != nil {
			t.Fatal(err)
		}
		if err := CleanupStale(dir, "svc"); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if !alive(stranger.Process.Pid) {
			t.Fatalf("another %s: the stranger was killed", what)
		}
		if _, err := os.Stat(path); err == nil {
			t.Errorf("another %s: the file is still there", what)
		}
	}
}

// Whoever kills PID 1, all inside ends, and the agent is told.
func TestAllEndsWithInit(t *testing.T) {
	needRoot(t)
	c := startPlain(t, Options{})
	if err := syscall.Kill(c.InitPID(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	inside := c.Command("sleep", "1000")
	if err := inside.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "sleep starts", func() bool { return sleeps(c.InitPID()) })
	if err := syscall.Kill(c.InitPID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := exitCode(inside.Wait()); got != 128+9 {
		t.Errorf("sleep ended with %d", got)
	}
	select {
	case <-c.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("Done is not closed")
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func startPlain(t *testing.T, opt Options) *Capsule {
	t.Helper()
	opt.Name, opt.RunDir = "svc", t.TempDir()
	c, err := Start(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestInside(t *testing.T) {
	needRoot(t)
	// Something that the agent inherited from whoever started it.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	c := startPlain(t, Options{Sysctls: map[string]string{"net.ipv4.tcp_fin_timeout": "7"}})
	t.Logf("Start %v", time.Since(start))

	leaked, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range glob(t, fmt.Sprintf("/proc/%d/fd/*", c.InitPID())) {
		if to, _ := os.Readlink(fd); to == leaked {
			t.Errorf("PID 1 holds %s, which it inherited", to)
		}
	}

	// Command is in all three namespaces, and /proc is of the new one.
	out, err := c.Command("sh", "-c", `readlink /proc/self/ns/net /proc/self/ns/pid /proc/self/ns/mnt; cat /proc/1/comm; exit 7`).Output()
	if exitCode(err) != 7 {
		t.Errorf("exit status 7 arrived as %v", err)
	}
	got := strings.Fields(string(out))
	for i, ns := range []string{"net", "pid", "mnt"} {
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", c.InitPID(), ns))
		if err != nil {
			t.Fatal(err)
		}
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 4 || got[i] != theirs || theirs == ours {
			t.Errorf("%s: command has %v, PID 1 %s, the agent %s", ns, got, theirs, ours)
		}
	}
	if len(got) != 4 || got[3] != "ftckpt-capsule" {
		t.Errorf("inside, PID 1 is %v", got)
	}

	// A mount inside stays inside.
	dir := t.TempDir()
	if err := c.Command("mount", "-t", "tmpfs", "none", dir).Run(); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("%s is mounted outside (%v)", dir, err)
	}

	for name, want := range map[string]string{
		"net.ipv4.tcp_fin_timeout": "7", "net.ipv4.conf.lo.rp_filter": "0",
		"net.ipv4.tcp_timestamps": "1", "net.ipv4.ip_nonlocal_bind": "1",
	} {
		var now string
		if err := c.Do(func() (err error) { now, err = readSysctl(name); return err }); err != nil || now != want {
			t.Errorf("%s = %s inside (%v), want %s", name, now, err, want)
		}
	}

	// Do comes home, whatever the function does.
	home, _ := os.Readlink("/proc/thread-self/ns/net")
	boom := errors.New("boom")
	if err := c.Do(func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Do: %v", err)
	}
	if now, _ := os.Readlink("/proc/thread-self/ns/net"); now != home {
		t.Errorf("the caller's thread went from %s to %s", home, now)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	m, err := filepath.Glob(pattern)
	if err != nil || len(m) == 0 {
		t.Fatalf("%s: %v, %v", pattern, m, err)
	}
	return m
}

// TCP settings of the host are the capsule's, also those that a new namespace
// does not inherit.
func TestSysctlsFollowTheHost(t *testing.T) {
	l := newLab(t)
	want := map[string]string{
		"net.ipv4.tcp_rmem": "4096\t70000\t900000", "net.ipv4.tcp_keepalive_time": "1234",
		"net.ipv4.ip_local_port_range": "40000\t50000", "net.core.somaxconn": "777",
	}
	l.must(l.in(l.stand, func() error {
		for name, value := range want {
			if err := writeSysctl(name, value); err != nil {
				return err
			}
		}
		return writeSysctl("net.ipv4.tcp_timestamps", "0")
	}))
	want["net.ipv4.tcp_timestamps"] = "1" // not this one
	c := l.capsule(Options{})
	for name, value := range want {
		var now string
		if err := c.Do(func() (err error) { now, err = readSysctl(name); return err }); err != nil || now != value {
			t.Errorf("%s = %q inside (%v), want %q", name, now, err, value)
		}
	}
}

func TestReservePIDs(t *testing.T) {
	needRoot(t)
	c := startPlain(t, Options{})
	tids, err := c.pids()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range tids {
		if p != 1 && p < c.pidMax-helperPIDs {
			t.Errorf("PID 1 has thread %d, which an image may need", p)
		}
	}
	pidOf := func() int {
		out, err := c.Command("sh", "-c", "echo $$").Output()
		if err != nil {
			t.Fatal(err)
		}
		p, err := strconv.Atoi(strings.TrimSpace(string(out)))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	var avoid []int
	for p := 150; p < 4000; p += 100 {
		avoid = append(avoid, p)
	}
	if err := c.ReservePIDs(avoid); err != nil {
		t.Fatal(err)
	}
	if p := pidOf(); p < 3951 || p > 3951+10 {
		t.Errorf("a helper got pid %d, want the first of the run after 3950", p)
	}
	if err := c.ReservePIDs(nil); err != nil {
		t.Fatal(err)
	}
	if p := pidOf(); p < firstPID || p > firstPID+10 {
		t.Errorf("a helper got pid %d, want about %d", p, firstPID)
	}
	for _, p := range tids {
		if err := c.ReservePIDs([]int{4000, p}); !errors.Is(err, ErrPIDTaken) {
			t.Errorf("reserve a thread of PID 1: %v", err)
		}
	}
	if err := c.ReservePIDs([]int{c.pidMax}); err == nil {
		t.Error("a pid beyond the limit was promised")
	}

	// A capsule made for an image whose PIDs are where the threads would go.
	high := startPlain(t, Options{AvoidPIDs: tids[1:]})
	if err := high.ReservePIDs(tids[1:]); err != nil {
		t.Error(err)
	}
}

// Orphans become PID 1's children; none may stay a zombie, since a zombie keeps
// its PID.
func TestInitReaps(t *testing.T) {
	needRoot(t)
	c := startPlain(t, Options{})
	for range 3 {
		if err := c.Command("sh", "-c", `for i in 1 2 3 4 5 6 7 8; do (sleep 0.0$i & ) ; done`).Run(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 5*time.Second, "only PID 1 is left", func() bool {
		empty, err := c.Empty()
		return empty && err == nil
	})
}

func TestStartFails(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for what, opt := range map[string]Options{
		"name with a slash":  {Name: "../x", RunDir: dir},
		"device name":        {Name: "svc", RunDir: dir, VIPDev: "a/b"},
		"a setting's value":  {Name: "svc", RunDir: dir, Sysctls: map[string]string{"net.ipv4.tcp_rmem": "x"}},
		"a setting's name":   {Name: "svc", RunDir: dir, Sysctls: map[string]string{"net.ipv4.no_such": "1"}},
		"no free thread ids": {Name: "svc", RunDir: dir, AvoidPIDs: everyPID(t)},
	} {
		if c, err := Start(t.Context(), opt); err == nil {
			t.Errorf("%s: started", what)
			c.Close()
		} else {
			t.Log(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if c, err := Start(ctx, Options{Name: "svc", RunDir: dir}); !errors.Is(err, context.Canceled) {
		t.Errorf("start with an ended context: %v", err)
		c.Close()
	}
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	c := startPlain(t, Options{Dev: "no-such-device"})
	if err := c.PrepareVIPs([]netip.Prefix{vip}); err == nil {
		t.Error("prepared an address on no device")
	}
	if len(c.VIPs()) > 0 {
		t.Errorf("the capsule has %v all the same", c.VIPs())
	}
}

// everyPID makes it impossible to find a free run.
func everyPID(t *testing.T) []int {
	t.Helper()
	n := 1 << 22 // PID_MAX_LIMIT
	var all []int
	for p := helperPIDs / 2; p < n; p += helperPIDs / 2 {
		all = append(all, p)
	}
	return all
}

// hostRole is a lab host that is a PID, mount and network namespace itself. It
// runs a capsule from start to end, and adopts it half-way.
func hostRole(dir string) error {
	if os.Getpid() != 1 {
		return errors.New("not PID 1")
	}
	if _, err := Start(context.Background(), Options{Name: "svc", RunDir: dir}); err == nil {
		return errors.New("started with the /proc of another PID namespace")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: linkAttrs("s0"), PeerName: "s1"}); err != nil {
		return err
	}
	for _, name := range []string{"s0", "s1"} {
		dev, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(dev); err != nil {
			return err
		}
	}
	c, err := Start(context.Background(), Options{Name: "svc", RunDir: dir, Dev: "s0"})
	if err != nil {
		return err
	}
	steps := []func() error{
		func() error { return c.PrepareVIPs([]netip.Prefix{netip.MustParsePrefix("10.1.1.1/24")}) },
		func() error { return c.ReservePIDs([]int{101}) },
		func() error { return c.Command("sh", "-c", `test $$ -lt 200 && test -d /sys/class`).Run() },
		func() error { return c.Command("setsid", "sleep", "1000").Start() },
		func() error { return c.TakeVIP() },
		func() error { return c.Announce(context.Background()) },
		func() error { c.Release(); return nil },
		func() (err error) { c, err = Adopt(dir, "svc"); return err },
		func() error {
			if fmt.Sprint(c.VIPs()) != "[10.1.1.1/24]" || !c.taken {
				return fmt.Errorf("adopted with %v, taken %v", c.VIPs(), c.taken)
			}
			return c.Announce(context.Background())
		},
		func() error { return c.Close() },
		func() error {
			// nsenter sees the end of what it waited for a moment later.
			var left []string
			for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
				left, _ = filepath.Glob("/proc/[0-9]*")
				left = slices.DeleteFunc(left, func(p string) bool {
					pid, _ := strconv.Atoi(filepath.Base(p))
					return pid == 1 || !alive(pid)
				})
				if len(left) == 0 {
					return nil
				}
			}
			return fmt.Errorf("left behind: %v", left)
		},
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	fmt.Println("done")
	return nil
}

func TestNestedInALabHost(t *testing.T) {
	needRoot(t)
	host := roleCommand(t, "host "+t.TempDir())
	host.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if line := startLine(t, host); line != "done" {
		t.Error(line)
	}
}
