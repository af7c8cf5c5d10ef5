package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Hook()
	if len(os.Args) > 1 && os.Args[1] == "test-owner" {
		os.Exit(ownerMain())
	}
	os.Exit(m.Run())
}

func two(t *testing.T) (*Lab, *Host, *Host) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	l, err := New(ctx, Topology{Hosts: []HostSpec{{"alice", "10.77.0.2/24"}, {"bob", "10.77.0.3/24"}}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, l.Host("alice"), l.Host("bob")
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s for: %s", what)
		}
	}
}

// namespaces returns the namespaces of that kind any process is in.
func namespaces(t *testing.T, kind string) map[string]bool {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, l := range links {
		if ns, err := os.Readlink(l); err == nil {
			out[ns] = true
		}
	}
	return out
}

func TestHostsReachEachOther(t *testing.T) {
	_, alice, bob := two(t)
	ln, err := bob.Listen("tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		_, _ = c.Write(sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("echo: %d of %d bytes, %v", len(got), len(sent), err)
	}
}

func TestAddAddr(t *testing.T) {
	_, alice, bob := two(t)
	if err := bob.AddAddr("10.77.0.100/24"); err != nil {
		t.Fatal(err)
	}
	startEcho(t, bob)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.100:7000")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := bob.DelAddr("10.77.0.100/24"); err != nil {
		t.Fatal(err)
	}
	if err := bob.DelAddr("10.77.0.100/24"); err == nil {
		t.Error("an address that is not there was removed")
	}
}

// What a command of a host sees is the host's: name, processes, device, /run.
func TestCommandIsOnTheHost(t *testing.T) {
	_, alice, bob := two(t)
	out, err := alice.Command("sh", "-c", `hostname; ls /sys/class/net | tr '\n' ' '; echo
		echo $$; readlink /proc/self/fd/0; ps -o sid= -p $$; ls /proc | grep -c '^[0-9]'
		ls /run; touch /run/mine; pwd`).Output()
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(f) != 8 || f[0] != "alice" || !strings.Contains(f[1], "eth0") || f[3] != "/dev/null" ||
		f[6] != "lock" || f[7] != "/" {
		t.Errorf("unexpected view of the host: %q", f)
	}
	if strings.TrimSpace(f[4]) != f[2] {
		t.Errorf("session %q is not the command's own (pid %s)", f[4], f[2])
	}
	if n, _ := strconv.Atoi(f[5]); n > 10 {
		t.Errorf("host sees %d processes", n)
	}
	if out, err := bob.Command("ls", "/run").Output(); err != nil || strings.Contains(string(out), "mine") {
		t.Errorf("/run is not private: %q, %v", out, err)
	}
	if _, err := os.Stat("/run/mine"); err == nil {
		t.Error("/run is the machine's")
	}
	var ee *exec.ExitError
	if _, err := alice.Command("sh", "-c", "echo why >&2; exit 7").Output(); !errors.As(err, &ee) ||
		ee.ExitCode() != 7 || !strings.Contains(err.Error(), "why") {
		t.Errorf("exit status was lost: %v", err)
	}
}

// A descriptor that our parent left open must not reach a service: CRIU could
// not dump it.
func TestServiceInheritsNothing(t *testing.T) {
	fd, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // without CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	l, alice, _ := two(t)
	p, err := alice.Start(Service{Name: "ls", Args: []string{"ls", "-l", "/proc/self/fd"}})
	if err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	out, err := os.ReadFile(p.OutFile())
	if err != nil {
		t.Fatal(err)
	}
	// 0, 1, 2 and the directory itself, after the line of the total.
	if n := strings.Count(string(out), "\n"); n != 5 {
		t.Errorf("descriptors of a service (logs in %s):\n%s", l.LogDir(), out)
	}
}

func TestServiceHasHighPIDAndLogs(t *testing.T) {
	l, alice, _ := two(t)
	p, err := alice.Start(Service{Name: "svc", Args: []string{"sh", "-c", "echo hello; echo oops >&2; exec sleep 1000"}, HighPID: true})
	if err != nil {
		t.Fatal(err)
	}
	if p.PID() <= 30000 || !alice.Exists(p.PID()) {
		t.Errorf("PID is %d, want one above 30000 that exists", p.PID())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if line, err := p.WaitLine(ctx, func(s string) bool { return strings.HasPrefix(s, "hel") }); err != nil || line != "hello" {
		t.Errorf("WaitLine: %q, %v", line, err)
	}
	again, err := alice.Start(Service{Name: "svc", Args: []string{"echo", "other"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.WaitLine(ctx, func(s string) bool { return s == "hello" }); err == nil {
		t.Error("WaitLine found a line of an earlier process of the same name")
	}
	if !strings.HasPrefix(p.OutFile(), l.LogDir()) {
		t.Errorf("log is at %s", p.OutFile())
	}
	out, err := alice.Command("sh", "-c", "echo $$").Output()
	if err != nil {
		t.Fatal(err)
	}
	if low, _ := strconv.Atoi(strings.TrimSpace(string(out))); low < 1 || low > 1000 {
		t.Errorf("a later PID is %q, want a low one", out)
	}
	if err := p.Stop(ctx); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("Stop: %v", err)
	}
	if _, err := p.WaitLine(ctx, func(string) bool { return false }); err == nil || !strings.Contains(err.Error(), "oops") {
		t.Errorf("the error of a line that never comes lacks stderr: %v", err)
	}
}

// A host starts a capsule: namespaces within namespaces, all ended by Kill.
func TestNestedNamespacesDieWithTheHost(t *testing.T) {
	_, alice, _ := two(t)
	before := namespaces(t, "pid")
	p, err := alice.Start(Service{Args: []string{"unshare", "--fork", "--pid", "--net", "--mount", "--mount-proc",
		"sh", "-c", "echo $$ in; exec sleep 1000"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if line, err := p.WaitLine(ctx, func(s string) bool { return strings.HasSuffix(s, "in") }); err != nil || line != "1 in" {
		t.Fatalf("capsule: %q, %v", line, err)
	}
	if n := len(namespaces(t, "pid")); n <= len(before) {
		t.Fatalf("no nested PID namespace: %d then %d", len(before), n)
	}
	if err := alice.Kill(); err != nil {
		t.Fatal(err)
	}
	if alice.Alive() {
		t.Error("killed host is alive")
	}
	if _, err := alice.Command("true").Output(); err == nil {
		t.Error("a command ran on a dead host")
	}
}

// The point of the lab: a host that dies says nothing to anybody.
func TestKillIsSilent(t *testing.T) {
	l, alice, bob := two(t)
	p := startEcho(t, bob)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil {
		t.Fatal(err)
	}
	pcap, err := bob.Capture("bob.pcap")
	if err != nil {
		t.Fatal(err)
	}
	if err := bob.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	default:
		t.Error("a process of the dead host lives")
	}
	// Unacknowledged data, and a read: an RST or FIN would end the read.
	if _, err := c.Write([]byte("anybody?")); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the dead host spoke: %d bytes, %v", n, err)
	}
	if err := pcap.Stop(true); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tcpdump", "-nr", filepath.Join(l.LogDir(), "bob.pcap"), "src 10.77.0.3 and tcp[tcpflags] & (tcp-fin|tcp-rst) != 0").Output()
	if err != nil || len(out) != 0 {
		t.Errorf("FIN or RST of the dead host: %s %v", out, err)
	}
}

// Without the cut link a killed process is heard of: the proof that the test
// above can fail.
func TestProcessDeathIsHeard(t *testing.T) {
	_, alice, bob := two(t)
	p := startEcho(t, bob)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(buf); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read after the process died: %v", err)
	}
}

// startEcho runs an echo server on the host's port 7000, as a process of it.
func startEcho(t *testing.T, h *Host) *Process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := h.Start(Service{Name: "echo", Args: []string{exe, "test-owner", "echo"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := p.WaitLine(ctx, func(s string) bool { return s == "listening" }); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCutLinkAndRestore(t *testing.T) {
	_, alice, bob := two(t)
	startEcho(t, bob)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := bob.CutLink(); err != nil {
		t.Fatal(err)
	}
	out, err := bob.Command("cat", "/sys/class/net/eth0/carrier").Output()
	if err != nil || string(out) != "0\n" {
		t.Errorf("carrier of the cut host: %q %v", out, err)
	}
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read over a cut link: %v", err)
	}
	if err := bob.RestoreLink(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(15 * time.Second))
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("after the link came back: %q, %v", buf, err)
	}
}

func TestPauseAndResume(t *testing.T) {
	_, alice, bob := two(t)
	startEcho(t, bob)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := alice.Dial(ctx, "tcp", "10.77.0.3:7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := bob.Pause(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a paused host answered: %v", err)
	}
	if err := bob.Resume(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, buf); err != nil {
		t.Fatalf("after resume: %v", err)
	}
}

func TestLoss(t *testing.T) {
	_, alice, bob := two(t)
	// arrive sends datagrams one way and counts those that come.
	arrive := func(from, to *Host, wait time.Duration) (n int) {
		t.Helper()
		var pc net.PacketConn
		addr := net.JoinHostPort(to.Addr().String(), "9000")
		if err := to.Do(func() (err error) { pc, err = net.ListenPacket("udp", addr); return err }); err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		c, err := from.Dial(t.Context(), "udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, 8)
		for i := range 400 {
			if _, err := c.Write([]byte{byte(i)}); err != nil {
				t.Fatal(err)
			}
			_ = pc.SetReadDeadline(time.Now().Add(wait))
			if _, _, err := pc.ReadFrom(buf); err == nil {
				n++
			}
		}
		return n
	}
	if n := arrive(alice, bob, 5*time.Second); n != 400 {
		t.Fatalf("%d of 400 arrived without loss", n)
	}
	if err := bob.Loss(30); err != nil {
		t.Fatal(err)
	}
	// 280 are expected, with a standard deviation of 9.
	for _, way := range [][2]*Host{{alice, bob}, {bob, alice}} {
		if n := arrive(way[0], way[1], 5*time.Millisecond); n < 200 || n > 360 {
			t.Errorf("%d of 400 arrived from %s with 30%% loss, want about 280", n, way[0].Name())
		}
	}
	if err := bob.Loss(0); err != nil {
		t.Fatal(err)
	}
	if n := arrive(alice, bob, 5*time.Second); n != 400 {
		t.Errorf("%d of 400 arrived after the loss ended", n)
	}
	if err := bob.Loss(101); err == nil {
		t.Error("a loss of 101% was accepted")
	}
}

func TestBadTopology(t *testing.T) {
	for _, topo := range []Topology{
		{Hosts: []HostSpec{{"a", "10.77.0.2/24"}, {"a", "10.77.0.3/24"}}},
		{Hosts: []HostSpec{{"Not a name", ""}}},
		{Hosts: []HostSpec{{"a", "10.77.0.2"}}},
	} {
		if l, err := New(t.Context(), topo, Options{}); err == nil {
			_ = l.Close()
			t.Errorf("topology %v was accepted", topo)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	l, alice, bob := two(t)
	startEcho(t, bob)
	startEcho(t, alice)
	dir := l.Dir()
	var mine []string
	for _, h := range []*Host{alice, bob} {
		for _, kind := range []string{"net", "pid", "mnt"} {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", h.InitPID(), kind))
			if err != nil {
				t.Fatal(err)
			}
			mine = append(mine, ns)
		}
	}
	mounts := func() string {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	before := mounts()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, dir, mine)
	if after := mounts(); after != before {
		t.Errorf("mounts changed:\n%s\n%s", before, after)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// nothingLeft checks that no process names the lab or is in its namespaces.
func nothingLeft(t *testing.T, dir string, mine []string) {
	t.Helper()
	for _, ns := range mine {
		kind, _, _ := strings.Cut(ns, ":")
		if namespaces(t, kind)[ns] {
			t.Errorf("namespace %s lives", ns)
		}
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range cmdlines {
		if b, _ := os.ReadFile(f); bytes.Contains(b, []byte(dir)) {
			t.Errorf("process left: %s %q", f, b)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory left: %v", err)
	}
}

// ownerMain is another process: an owner of a lab that will be killed, or an
// echo server.
func ownerMain() int {
	if os.Args[2] == "echo" {
		ln, err := net.Listen("tcp", ":7000")
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println("listening")
		for {
			c, err := ln.Accept()
			if err != nil {
				return 1
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}
	l, err := New(context.Background(), Topology{Hosts: []HostSpec{{"carol", "10.77.0.2/24"}}}, Options{})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if _, err := l.Host("carol").Start(Service{Args: []string{"sleep", "1000"}}); err != nil {
		fmt.Println(err)
		return 1
	}
	if os.Args[2] == "stuck" { // PID 1 stopped: it cannot see its owner's end
		_ = unix.Kill(l.Host("carol").InitPID(), unix.SIGSTOP)
	}
	fmt.Println(l.Dir(), l.Host("carol").InitPID())
	select {}
}

func TestDeadOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, kind := range []string{"dies", "stuck"} {
		t.Run(kind, func(t *testing.T) {
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			owner := exec.Command(exe, "test-owner", kind)
			out, err := owner.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := owner.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadString('\n')
			f := strings.Fields(line)
			if err != nil || len(f) != 2 {
				t.Fatalf("owner said %q, %v", line, err)
			}
			dir, init := f[0], f[1]
			if err := CleanupStale(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat("/proc/" + init); err != nil {
				t.Fatalf("the lab of a living owner was cleaned up: %v", err)
			}
			var mine []string
			for _, k := range []string{"net", "pid", "mnt"} {
				ns, err := os.Readlink("/proc/" + init + "/ns/" + k)
				if err != nil {
					t.Fatal(err)
				}
				mine = append(mine, ns)
			}
			if err := owner.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = owner.Wait()
			if kind == "stuck" {
				if _, err := os.Stat("/proc/" + init); err != nil {
					t.Fatalf("the stuck init ended by itself: %v", err)
				}
			}
			if err := CleanupStale(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the host's processes to end", func() bool {
				for _, ns := range mine {
					k, _, _ := strings.Cut(ns, ":")
					if namespaces(t, k)[ns] {
						return false
					}
				}
				return true
			})
			nothingLeft(t, dir, mine)
		})
	}
}
