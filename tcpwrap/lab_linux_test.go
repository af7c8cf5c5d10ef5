package tcpwrap

import (
	"bufio"
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

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// deadline bounds every wait for something that must happen; quiet is how long
// something that must not happen is waited for.
const (
	deadline = 20 * time.Second
	quiet    = 150 * time.Millisecond
)

// lab is two hosts on a wire, in network namespaces of their own:
//
//	client --------- veth --------- server
//	cli0 10.201.0.2/24     10.201.0.1/24 srv0
//	     fd00:201::2/64   fd00:201::1/64
type lab struct {
	client, server string // namespaces
	dev            string // the server's device
}

var (
	labServer4 = netip.MustParseAddr("10.201.0.1")
	labServer6 = netip.MustParseAddr("fd00:201::1")
	labClient4 = netip.MustParseAddr("10.201.0.2")
)

func newLab(t testing.TB) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	var b [4]byte
	rand.Read(b[:])
	id := fmt.Sprintf("ftw%d-%s", os.Getpid(), hex.EncodeToString(b[:]))
	l := &lab{client: id + "-c", server: id + "-s", dev: "srv0"}
	for _, ns := range []string{l.client, l.server} {
		run(t, "ip", "netns", "add", ns)
		t.Cleanup(func() { run(t, "ip", "netns", "del", ns) })
		run(t, "ip", "-n", ns, "link", "set", "lo", "up")
	}
	run(t, "ip", "-n", l.client, "link", "add", "cli0", "type", "veth", "peer", "name", l.dev, "netns", l.server)
	for _, s := range []struct{ ns, dev, v4, v6 string }{
		{l.client, "cli0", labClient4.String() + "/24", "fd00:201::2/64"},
		{l.server, l.dev, labServer4.String() + "/24", labServer6.String() + "/64"},
	} {
		run(t, "ip", "-n", s.ns, "addr", "add", s.v4, "dev", s.dev)
		run(t, "ip", "-n", s.ns, "addr", "add", s.v6, "dev", s.dev, "nodad")
		run(t, "ip", "-n", s.ns, "link", "set", s.dev, "up")
	}
	return l
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

const (
	labPort  = 7777
	labQueue = 77
	labMark  = 0x66746370
)

func (l *lab) rules(vip netip.Addr) Rules {
	return Rules{Name: "test", VIPs: []netip.Addr{vip}, Ports: []uint16{labPort}, Dev: l.dev, Queue: labQueue, Mark: labMark, NetNS: l.server}
}

func (l *lab) open(t testing.TB) *NFQueue {
	t.Helper()
	q, err := OpenNFQueue(NFQueueOptions{NetNS: l.server, Queue: labQueue, Mark: labMark})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.Close() })
	return q
}

func (l *lab) install(t testing.TB, vip netip.Addr) Rules {
	t.Helper()
	r := l.rules(vip)
	if err := r.Install(); err != nil {
		t.Fatal(err)
	}
	return r
}

// serve runs handle for every connection to the server until the test ends.
func (l *lab) serve(t testing.TB, vip netip.Addr, handle func(*net.TCPConn)) {
	t.Helper()
	var ln *net.TCPListener
	err := nsthread.InNamed(l.server, func() (err error) {
		ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(vip, labPort)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []*net.TCPConn
	wg.Go(func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() { defer c.Close(); handle(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func echo(c *net.TCPConn) { _, _ = io.Copy(struct{ io.Writer }{c}, c) }

func (l *lab) tryDial(vip netip.Addr) (c *net.TCPConn, err error) {
	err = nsthread.InNamed(l.client, func() error {
		d := net.Dialer{Timeout: deadline}
		x, err := d.Dial("tcp", netip.AddrPortFrom(vip, labPort).String())
		if err == nil {
			c = x.(*net.TCPConn)
		}
		return err
	})
	return c, err
}

func (l *lab) dial(t testing.TB, vip netip.Addr) *net.TCPConn {
	t.Helper()
	c, err := l.tryDial(vip)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.SetLinger(0); c.Close() })
	return c
}

// ask sends a line and wants it back.
func ask(t testing.TB, c *net.TCPConn, line string) {
	t.Helper()
	send(t, c, line)
	want(t, c, line)
}

func send(t testing.TB, c *net.TCPConn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func want(t testing.TB, c *net.TCPConn, s string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(deadline))
	got := make([]byte, len(s))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != s {
		t.Fatalf("got %q, want %q (%v)", got[:n], s, err)
	}
}

// silent checks that nothing comes, not even an end.
func silent(t testing.TB, c *net.TCPConn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(quiet))
	var b [1]byte
	if n, err := c.Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d octets, error %v, where nothing must come", n, err)
	}
}

// caught is a packet of the tap, its segment copied.
type caught struct {
	Packet
	Seg Segment
}

// tap owns a queue: it shows decide every packet, in order, and carries out its
// verdict; a zero verdict holds the packet.
type tap struct {
	q   *NFQueue
	end chan error

	mu   sync.Mutex
	cond *sync.Cond
	seen []caught
	held []caught
	big  int // octets of the largest packet
}

func newTap(t testing.TB, q *NFQueue, decide func(caught) Verdict) *tap {
	tp := &tap{q: q, end: make(chan error, 1)}
	tp.cond = sync.NewCond(&tp.mu)
	go func() { tp.end <- tp.loop(decide) }()
	t.Cleanup(func() {
		q.Close()
		if err := <-tp.end; err != nil {
			t.Errorf("tap: %v", err)
		}
	})
	return tp
}

func (tp *tap) loop(decide func(caught) Verdict) error {
	var pkts []Packet
	for {
		var err error
		if pkts, err = tp.q.Recv(pkts[:0]); err != nil {
			if errors.Is(err, ErrClosed) {
				return nil
			}
			return err
		}
		tp.mu.Lock()
		for _, p := range pkts {
			c := caught{Packet: p}
			if err := ParseSegment(p.Data, p.Dir, &c.Seg); err != nil {
				tp.mu.Unlock()
				return err
			}
			tp.big = max(tp.big, len(p.Data))
			v := Accept
			if decide != nil {
				c.Data = nil
				c.Seg.Payload = append([]byte(nil), c.Seg.Payload...)
				c.Seg.RawOptions = append([]byte(nil), c.Seg.RawOptions...)
				tp.seen = append(tp.seen, c)
				v = decide(c)
			}
			if v == 0 {
				tp.held = append(tp.held, c)
				continue
			}
			tp.q.Verdict(p.ID, v)
		}
		tp.cond.Broadcast()
		tp.mu.Unlock()
		if err := tp.q.Flush(); err != nil && !errors.Is(err, ErrClosed) {
			return err
		}
	}
}

// until waits for a condition on the tap, checked whenever a packet came.
func (tp *tap) until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	late := false
	timer := time.AfterFunc(deadline, func() { tp.mu.Lock(); late = true; tp.cond.Broadcast(); tp.mu.Unlock() })
	defer timer.Stop()
	tp.mu.Lock()
	defer tp.mu.Unlock()
	for !cond() {
		if late {
			t.Fatalf("%s: not in %v; %d packets seen, %d held", what, deadline, len(tp.seen), len(tp.held))
		}
		tp.cond.Wait()
	}
}

// release gives the first n held packets a verdict.
func (tp *tap) release(t testing.TB, n int, v Verdict) {
	t.Helper()
	tp.mu.Lock()
	for _, c := range tp.held[:n] {
		tp.q.Verdict(c.ID, v)
	}
	tp.held = tp.held[n:]
	tp.mu.Unlock()
	if err := tp.q.Flush(); err != nil {
		t.Fatal(err)
	}
}

// eventually polls for a condition that nothing announces.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in %v", what, deadline)
		}
	}
}

// child runs a test function of this binary in a process of its own and waits
// for its line "ready".
func child(t testing.TB, test string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		if sc.Text() == "ready" {
			return cmd
		}
		t.Log(sc.Text())
	}
	t.Fatal("the child ended before it was ready")
	return nil
}
