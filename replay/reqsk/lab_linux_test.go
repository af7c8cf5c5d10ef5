package reqsk

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// deadline bounds every wait for something that must happen.
const deadline = 20 * time.Second

// lab is a client and two servers of one address, in network namespaces:
//
//	          cold ------ veth ------ dev0  old server
//	client ---+  10.202.1.1/.2, fd00:202:1::1/::2
//	          cnew ------ veth ------ dev0  new server
//	             10.202.2.1/.2, fd00:202:2::1/::2
//
// The client's own address is on its lo; its route says which server has the
// service's.
type lab struct {
	client, old, new string // namespaces
	v6               bool
	vip, caddr       netip.Addr
	wire             *wire
}

const (
	labPort = 7777
	labMark = 0x66746370
)

func newLab(t testing.TB, v6 bool) *lab {
	t.Helper()
	needKernel(t)
	var b [4]byte
	rand.Read(b[:])
	id := fmt.Sprintf("ftr%d-%s", os.Getpid(), hex.EncodeToString(b[:]))
	l := &lab{client: id + "-c", old: id + "-o", new: id + "-n", v6: v6,
		vip: netip.MustParseAddr("10.202.9.1"), caddr: netip.MustParseAddr("10.202.8.1")}
	if v6 {
		l.vip, l.caddr = netip.MustParseAddr("fd00:202:9::1"), netip.MustParseAddr("fd00:202:8::1")
	}
	var script strings.Builder
	for _, ns := range []string{l.client, l.old, l.new} {
		run(t, "ip", "netns", "add", ns)
		t.Cleanup(func() { run(t, "ip", "netns", "del", ns) })
		// Until a device's own address is known to be nobody else's, which takes
		// two seconds, nothing is sent from it.
		sysctl(t, ns, "net/ipv6/conf/default/accept_dad", "0")
	}
	fmt.Fprintf(&script, "link set lo up\naddr add %v dev lo nodad\n", l.prefix(l.caddr))
	for i, dev := range []string{"cold", "cnew"} {
		fmt.Fprintf(&script, "link add %s type veth peer name dev0 netns %s\n", dev, []string{l.old, l.new}[i])
		fmt.Fprintf(&script, "addr add %s dev %s nodad\nlink set %s up\n", l.link(i+1, 1), dev, dev)
	}
	batch(t, l.client, script.String())
	for i, ns := range []string{l.old, l.new} {
		via, _, _ := strings.Cut(l.link(i+1, 1), "/")
		batch(t, ns, fmt.Sprintf("link set lo up\nlink set dev0 up\naddr add %s dev dev0 nodad\naddr add %v dev dev0 nodad\nroute add %v via %s src %v\n",
			l.link(i+1, 2), l.prefix(l.vip), l.prefix(l.caddr), via, l.vip))
	}
	l.route(t, 1)
	l.wire = newWire(t, l.client)
	return l
}

func (l *lab) prefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func (l *lab) link(wire, end int) string {
	if l.v6 {
		return fmt.Sprintf("fd00:202:%d::%d/64", wire, end)
	}
	return fmt.Sprintf("10.202.%d.%d/24", wire, end)
}

// route sends the client's packets to the old (1) or the new (2) server.
func (l *lab) route(t testing.TB, wire int) {
	t.Helper()
	via, _, _ := strings.Cut(l.link(wire, 2), "/")
	batch(t, l.client, fmt.Sprintf("route replace %v via %s src %v\n", l.prefix(l.vip), via, l.caddr))
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// batch runs lines of ip(8) in a namespace.
func batch(t testing.TB, ns, lines string) {
	t.Helper()
	cmd := exec.Command("ip", "-n", ns, "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip -batch: %v: %s\n%s", err, out, lines)
	}
}

func sysctl(t testing.TB, ns, name, value string) {
	t.Helper()
	err := nsthread.InNamed(ns, func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
	if err != nil {
		t.Fatal(err)
	}
}

func readSysctl(t testing.TB, ns, name string) string {
	t.Helper()
	var b []byte
	err := nsthread.InNamed(ns, func() (err error) { b, err = os.ReadFile("/proc/sys/" + name); return err })
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in %v", what, deadline)
		}
	}
}

// listen opens the server's socket; network is "tcp" for one of both families
// on all addresses. backlog 0 means Go's own.
func (l *lab) listen(t testing.TB, ns, network string, backlog int) *net.TCPListener {
	t.Helper()
	addr := &net.TCPAddr{Port: labPort}
	if network != "tcp" {
		addr.IP = l.vip.AsSlice()
	}
	var ln *net.TCPListener
	err := nsthread.InNamed(ns, func() error {
		x, err := plainTCP().Listen(t.Context(), network, addr.String())
		if err == nil {
			ln = x.(*net.TCPListener)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	if backlog > 0 {
		rc, err := ln.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		cerr := rc.Control(func(fd uintptr) { err = unix.Listen(int(fd), backlog) })
		if err := errors.Join(cerr, err); err != nil {
			t.Fatal(err)
		}
	}
	return ln
}

func plainTCP() *net.ListenConfig {
	lc := &net.ListenConfig{}
	lc.SetMultipathTCP(false)
	return lc
}

func accept(t testing.TB, ln *net.TCPListener) *net.TCPConn {
	t.Helper()
	ln.SetDeadline(time.Now().Add(deadline))
	c, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// server answers every octet with one that depends on its place in the stream,
// so that a lost, doubled or foreign octet shows from there on.
func server(t testing.TB, ln *net.TCPListener) *served {
	s := &served{open: map[string]*net.TCPConn{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.open[c.RemoteAddr().String()] = c
			s.mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				pos, buf := 0, make([]byte, 32<<10)
				for {
					n, err := c.Read(buf)
					answer(buf[:n], pos)
					pos += n
					if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		s.mu.Lock()
		for _, c := range s.open {
			c.SetLinger(0)
			c.Close()
		}
		s.mu.Unlock()
		wg.Wait()
	})
	return s
}

// served are a server's connections by their client's address.
type served struct {
	mu   sync.Mutex
	open map[string]*net.TCPConn
}

func (s *served) conn(k *talker) *net.TCPConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[k.tuple.Client.String()]
}

func answer(b []byte, pos int) {
	for i := range b {
		b[i] ^= byte((pos+i)*7 + (pos+i)>>8 + 3)
	}
}

// talker is a client's connection that checks every octet of the answers.
type talker struct {
	*net.TCPConn
	tuple stream.FourTuple
	sent  []byte
	got   int
}

func (l *lab) dial(t testing.TB) *talker {
	t.Helper()
	var c *net.TCPConn
	err := nsthread.InNamed(l.client, func() (err error) {
		c, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.AddrPortFrom(l.vip, labPort)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.SetLinger(0); c.Close() })
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	return &talker{TCPConn: c, tuple: stream.FourTuple{
		Server: netip.AddrPortFrom(l.vip, labPort), Client: netip.AddrPortFrom(local.Addr().Unmap(), local.Port())}}
}

// say sends n random octets without waiting for the answer.
func (k *talker) say(t testing.TB, n int) {
	t.Helper()
	b := make([]byte, n)
	rand.Read(b)
	k.sent = append(k.sent, b...)
	k.SetWriteDeadline(time.Now().Add(deadline))
	if _, err := k.Write(b); err != nil {
		t.Fatal(err)
	}
}

// hear wants the answer to all that was said.
func (k *talker) hear(t testing.TB) {
	t.Helper()
	k.SetReadDeadline(time.Now().Add(deadline))
	got := make([]byte, len(k.sent)-k.got)
	n, err := io.ReadFull(k, got)
	want := bytes.Clone(k.sent[k.got:])
	answer(want, k.got)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%v: %d of %d octets, %d of them right: %v", k.tuple, n, len(want), same(got, want), err)
	}
	k.got += n
}

// talk says n octets while it listens.
func (k *talker) talk(t testing.TB, n int) {
	t.Helper()
	b := make([]byte, n)
	rand.Read(b)
	k.sent = append(k.sent, b...)
	done := make(chan error, 1)
	k.SetWriteDeadline(time.Now().Add(deadline))
	go func() { _, err := k.Write(b); done <- err }()
	k.hear(t)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func same(a, b []byte) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// cut takes the old server off the network, both ways and without a word, and
// sends the client's packets to the new one.
func (l *lab) cut(t testing.TB) {
	t.Helper()
	r := tcpwrap.Rules{Name: "cut", VIPs: []netip.Addr{l.vip}, Ports: []uint16{labPort}, Queue: 1, Mark: 1, NetNS: l.old}
	if err := r.Block(); err != nil {
		t.Fatal(err)
	}
	l.route(t, 2)
}

func (l *lab) recreator(t testing.TB) *Recreator {
	t.Helper()
	r, err := Open(l.new)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// agreed is what a socket's ends have agreed on.
type agreed struct {
	options        uint8 // 1 timestamps, 2 SACK, 4 window scaling, 8 ECN
	scales         uint8 // both ways
	sndMSS, advMSS uint32
	pmtu           uint32
	congestion     string
}

func inspect(t testing.TB, c *net.TCPConn) agreed {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var a agreed
	cerr := rc.Control(func(fd uintptr) {
		var i *unix.TCPInfo
		if i, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err != nil {
			return
		}
		// The octet after Options is two fields of four bits, which package unix
		// does not show.
		a = agreed{options: i.Options, sndMSS: i.Snd_mss, advMSS: i.Advmss, pmtu: i.Pmtu,
			scales: *(*uint8)(unsafe.Add(unsafe.Pointer(&i.Options), 1))}
		a.congestion, err = unix.GetsockoptString(int(fd), unix.SOL_TCP, unix.TCP_CONGESTION)
	})
	if err = errors.Join(err, cerr); err != nil {
		t.Fatal(err)
	}
	return a
}
