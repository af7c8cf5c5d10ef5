package capsule

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// The lab: every box is a network namespace without a name, so that it is gone
// when nothing holds it.
//
//	far 10.88.0.2 ── 10.88.0.1 client 10.77.0.2 ──┐
//	                 primary 10.77.0.1 (VIP) p0 ──┤ bridge
//	                         standby 10.77.0.3 s0 ┘
//	                            └ capsule: macvlan on s0
type lab struct {
	t                                   *testing.T
	bridge, far, client, primary, stand *os.File
}

var (
	vip     = netip.MustParsePrefix("10.77.0.1/24")
	roleEnv = "FTCKPT_CAPSULE_TEST_ROLE"
)

const port = 7000

func TestMain(m *testing.M) {
	RunInit()
	role, arg, _ := strings.Cut(os.Getenv(roleEnv), " ")
	os.Unsetenv(roleEnv)
	var err error
	switch role {
	case "":
		code := m.Run()
		if err := goleak.Find(); err != nil && code == 0 {
			fmt.Println(err)
			code = 1
		}
		os.Exit(code)
	case "serve":
		err = serve(arg)
	case "agent":
		err = agentRole(arg)
	case "host":
		err = hostRole(arg)
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// roleCommand runs this test binary in a role.
func roleCommand(t *testing.T, role string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

// roleInside runs this test binary in a role, in the capsule.
func roleInside(t *testing.T, c *Capsule, role string) *exec.Cmd {
	t.Helper()
	outside := roleCommand(t, role)
	cmd := c.Command(outside.Path)
	cmd.Env, cmd.Stderr = outside.Env, outside.Stderr
	return cmd
}

// startLine starts cmd and returns its first line of output.
func startLine(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.HasPrefix(line, "error:") {
		t.Fatalf("%v: %q, %v", cmd.Args, line, err)
	}
	return strings.TrimSpace(line)
}

// serve answers every connection to addr with the server's name.
func serve(arg string) error {
	addr, name, _ := strings.Cut(arg, " ")
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("listening", os.Getpid())
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		fmt.Fprintln(conn, name)
		conn.Close()
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func newLab(t *testing.T) *lab {
	t.Helper()
	needRoot(t)
	l := &lab{t: t}
	for _, ns := range []**os.File{&l.bridge, &l.far, &l.client, &l.primary, &l.stand} {
		*ns = newNetNS(t)
	}
	l.must(l.in(l.bridge, func() error {
		// VMs with br_netfilter would put bridged frames through iptables.
		_ = os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0)
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: linkAttrs("br0")})
	}))
	l.up(l.bridge, "br0")
	l.cable("c0", l.client, "10.77.0.2/24")
	l.cable("p0", l.primary, vip.String())
	l.cable("s0", l.stand, "10.77.0.3/24")

	veth := &netlink.Veth{LinkAttrs: linkAttrs("f1"), PeerName: "f0", PeerNamespace: netlink.NsFd(l.far.Fd())}
	l.must(l.in(l.client, func() error { return netlink.LinkAdd(veth) }))
	l.must(l.in(l.client, func() error { return writeSysctl("net.ipv4.ip_forward", "1") }))
	l.addr(l.client, "f1", "10.88.0.1/24")
	l.addr(l.far, "f0", "10.88.0.2/24")
	l.route(l.far, "10.88.0.1")
	l.route(l.primary, "10.77.0.2")
	l.route(l.stand, "10.77.0.2")

	// A bridge port forwards only some time after its link went up.
	for _, w := range []struct {
		from *os.File
		dev  string
		to   string
	}{{l.client, "c0", "10.77.0.1"}, {l.client, "c0", "10.77.0.3"}, {l.stand, "s0", "10.77.0.1"}, {l.far, "f0", "10.88.0.1"}} {
		eventually(t, 10*time.Second, w.to+" answers "+w.dev, func() bool {
			_, used := l.probe(w.from, w.dev, netip.MustParseAddr(w.to))
			return used
		})
	}
	return l
}

// cable connects a new interface of ns to the bridge.
func (l *lab) cable(name string, ns *os.File, addr string) {
	l.t.Helper()
	l.must(l.in(l.bridge, func() error {
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		attrs := linkAttrs("w" + name)
		attrs.MasterIndex = br.Attrs().Index
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(ns.Fd())})
	}))
	l.up(l.bridge, "w"+name)
	l.addr(ns, name, addr)
}

func (l *lab) addr(ns *os.File, dev, addr string) {
	l.t.Helper()
	l.must(l.in(ns, func() error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		return netlink.AddrAdd(link, a)
	}))
	l.up(ns, dev)
}

func (l *lab) route(ns *os.File, gw string) {
	l.t.Helper()
	l.must(l.in(ns, func() error { return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw)}) }))
}

func (l *lab) up(ns *os.File, dev string)   { l.t.Helper(); l.setLink(ns, dev, netlink.LinkSetUp) }
func (l *lab) down(ns *os.File, dev string) { l.t.Helper(); l.setLink(ns, dev, netlink.LinkSetDown) }

func (l *lab) setLink(ns *os.File, dev string, set func(netlink.Link) error) {
	l.t.Helper()
	l.must(l.in(ns, func() error {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		return set(link)
	}))
}

func (l *lab) in(ns *os.File, fn func() error) error { return nsthread.InNet(ns, fn) }

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// mac is the hardware address of dev in ns.
func (l *lab) mac(ns *os.File, dev string) string {
	l.t.Helper()
	var mac string
	l.must(l.in(ns, func() error {
		link, err := netlink.LinkByName(dev)
		if err == nil {
			mac = link.Attrs().HardwareAddr.String()
		}
		return err
	}))
	return mac
}

// neighbour is the hardware address that ns has in its cache for addr.
func (l *lab) neighbour(ns *os.File, addr netip.Addr) string {
	l.t.Helper()
	var mac string
	l.must(l.in(ns, func() error {
		all, err := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, n := range all {
			if n.IP.Equal(addr.AsSlice()) {
				mac = n.HardwareAddr.String()
			}
		}
		return err
	}))
	return mac
}

// ask connects from ns to the service and returns who answered.
func (l *lab) ask(ns *os.File, addr string, timeout time.Duration) (who string, err error) {
	err = l.in(ns, func() error {
		conn, err := net.DialTimeout("tcp", addr, timeout)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		b, err := io.ReadAll(conn)
		who = strings.TrimSpace(string(b))
		return err
	})
	return who, err
}

// capsule starts one on the standby.
func (l *lab) capsule(opt Options) *Capsule {
	l.t.Helper()
	opt.RunDir, opt.Dev = filepath.Join(l.t.TempDir(), "run"), "s0"
	if opt.Name == "" {
		opt.Name = "svc"
	}
	var c *Capsule
	l.must(l.in(l.stand, func() (err error) {
		c, err = Start(context.Background(), opt)
		return err
	}))
	l.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			l.t.Error(err)
		}
	})
	return c
}

func linkAttrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func newNetNS(t *testing.T) *os.File {
	t.Helper()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	var ns *os.File
	err = nsthread.InNet(home, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// eventually waits for a condition.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	_, err := identify(pid)
	return err == nil
}

// linksIn lists the interfaces of a namespace.
func linksIn(t *testing.T, ns *os.File) []string {
	t.Helper()
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}

// members lists the processes of a PID namespace, as we count, but for zombies:
// a dead agent's PID 1 is one until the machine's own PID 1 has looked.
func members(pidNS string) (pids []string) {
	links, _ := filepath.Glob("/proc/[0-9]*/ns/pid")
	for _, l := range links {
		p := strings.Split(l, "/")[2]
		pid, err := strconv.Atoi(p)
		if ns, e := os.Readlink(l); err == nil && e == nil && ns == pidNS && alive(pid) {
			pids = append(pids, p)
		}
	}
	return pids
}

func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		if ws, ok := e.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return e.ExitCode()
	}
	return -1
}
