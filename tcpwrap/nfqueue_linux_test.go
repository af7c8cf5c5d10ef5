package tcpwrap

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
)

func TestBothDirectionsAreCaught(t *testing.T) {
	for _, vip := range []netip.Addr{labServer4, labServer6} {
		t.Run(vip.String(), func(t *testing.T) {
			l := newLab(t)
			l.serve(t, vip, echo)
			tp := newTap(t, l.open(t), func(caught) Verdict { return Accept })
			l.install(t, vip)
			c := l.dial(t, vip)
			ask(t, c, "hello")
			tp.until(t, "the answer's ACK", func() bool { return len(tp.seen) >= 6 })
			tp.mu.Lock()
			defer tp.mu.Unlock()
			kinds := []struct {
				dir Direction
				fl  Flags
			}{{Inbound, SYN}, {Outbound, SYN | ACK}, {Inbound, ACK}}
			for i, k := range kinds {
				if p := tp.seen[i]; p.Dir != k.dir || p.Seg.Flags != k.fl || p.Corrupt {
					t.Errorf("packet %d: direction %d, flags %b, corrupt %v", i, p.Dir, p.Seg.Flags, p.Corrupt)
				}
			}
			got := map[Direction]string{}
			for _, p := range tp.seen {
				got[p.Dir] += string(p.Seg.Payload)
				if p.Seg.Tuple.Server != netip.AddrPortFrom(vip, labPort) || p.Seg.Tuple.Client.String() != c.LocalAddr().String() {
					t.Errorf("tuple %v", p.Seg.Tuple)
				}
			}
			if got[Inbound] != "hello" || got[Outbound] != "hello" {
				t.Errorf("payloads %q", got)
			}
		})
	}
}

func TestHeldPacketsLeaveInOrder(t *testing.T) {
	l := newLab(t)
	// Else TCP collects small writes for as long as an earlier one is held.
	run(t, "ip", "netns", "exec", l.server, "sysctl", "-qw", "net.ipv4.tcp_autocorking=0")
	l.serve(t, labServer4, func(c *net.TCPConn) {
		var b [1]byte
		_, _ = io.ReadFull(c, b[:])
		for _, s := range []string{"one,", "two,", "three"} { // TCP_NODELAY: three segments
			_, _ = io.WriteString(c, s)
		}
		_, _ = io.Copy(io.Discard, c)
	})
	tp := newTap(t, l.open(t), func(p caught) Verdict {
		if p.Dir == Outbound && len(p.Seg.Payload) > 0 {
			return 0
		}
		return Accept
	})
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	send(t, c, "!")
	tp.until(t, "three answers", func() bool { return len(tp.held) == 3 })
	silent(t, c)
	tp.release(t, 1, Accept)
	want(t, c, "one,")
	silent(t, c)
	tp.release(t, 2, Accept)
	want(t, c, "two,three")
	if n := tp.q.FailedVerdicts(); n != 0 {
		t.Errorf("%d verdicts failed", n)
	}
}

func TestInboundIsHeldFromTheServer(t *testing.T) {
	l := newLab(t)
	got := make(chan string, 10)
	l.serve(t, labServer4, func(c *net.TCPConn) {
		var b [64]byte
		for {
			n, err := c.Read(b[:])
			if err != nil {
				return
			}
			got <- string(b[:n])
		}
	})
	tp := newTap(t, l.open(t), func(p caught) Verdict {
		if p.Dir == Inbound && len(p.Seg.Payload) > 0 {
			return 0
		}
		return Accept
	})
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	send(t, c, "data")
	tp.until(t, "the data", func() bool { return len(tp.held) > 0 })
	select {
	case s := <-got:
		t.Fatalf("the server read %q, which is held", s)
	case <-time.After(quiet):
	}
	if n, err := tp.q.Held(); err != nil || n == 0 {
		t.Errorf("held: %d, %v", n, err)
	}
	tp.release(t, 1, Accept)
	if s := <-got; s != "data" {
		t.Errorf("read %q", s)
	}
}

// 200 MB each way, as super-segments, without a wrong octet.
func TestBulkThroughTheQueue(t *testing.T) {
	const size = 200 << 20
	l := newLab(t)
	sum := make(chan [32]byte, 1)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	content := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}), size) }
	l.serve(t, labServer4, func(c *net.TCPConn) {
		h := sha256.New()
		_, _ = io.Copy(h, io.LimitReader(c, size))
		sum <- [32]byte(h.Sum(nil))
		_, _ = io.Copy(struct{ io.Writer }{c}, content())
	})
	tp := newTap(t, l.open(t), nil)
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	h := sha256.New()
	start := time.Now()
	if _, err := io.Copy(struct{ io.Writer }{c}, io.TeeReader(content(), h)); err != nil {
		t.Fatal(err)
	}
	sent := [32]byte(h.Sum(nil))
	if got := <-sum; got != sent {
		t.Error("the server got other octets")
	}
	t.Logf("up: %.2f Gbit/s", size*8/time.Since(start).Seconds()/1e9)
	start = time.Now()
	back := sha256.New()
	if n, err := io.Copy(back, io.LimitReader(c, size)); err != nil || n != size {
		t.Fatalf("%d octets: %v", n, err)
	}
	t.Logf("down: %.2f Gbit/s", size*8/time.Since(start).Seconds()/1e9)
	if [32]byte(back.Sum(nil)) != sent {
		t.Error("the client got other octets")
	}
	tp.mu.Lock()
	defer tp.mu.Unlock()
	if tp.big < 16<<10 {
		t.Errorf("largest packet %d octets: no super-segments", tp.big)
	}
	if n := tp.q.Drops(); n != 0 {
		t.Errorf("%d packets dropped for want of room", n)
	}
}

// Verdicts and flushes of several goroutines at once, none lost.
func TestVerdictsFromManyGoroutines(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	q := l.open(t)
	ids := make(chan PacketID, 1000)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for id := range ids {
				q.Verdict(id, Accept)
				if err := q.Flush(); err != nil && !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			}
		})
	}
	tp := newTap(t, q, func(p caught) Verdict { ids <- p.ID; return 0 })
	t.Cleanup(func() { q.Close(); <-tp.end; tp.end <- nil; close(ids); workers.Wait() })
	l.install(t, labServer4)
	conns := make([]*net.TCPConn, 8)
	for i := range conns {
		conns[i] = l.dial(t, labServer4)
	}
	for range 200 {
		for _, c := range conns {
			send(t, c, "0123456789")
		}
		for _, c := range conns {
			want(t, c, "0123456789")
		}
	}
	if n := q.FailedVerdicts(); n != 0 {
		t.Errorf("%d verdicts failed", n)
	}
}

// What the kernel sends is read within its bounds.
func FuzzNfqMessage(f *testing.F) {
	f.Add(appendVerdict(nil, 1, 2, nfAccept))
	f.Add(appendConfig(nil, 1, appendAttr(nil, nfqCfgCmd, nfqCmdBind, 0, 0, 0)))
	hdr := appendAttr(nil, nfqAttrPacketHdr, 0, 0, 0, 9, 8, 0, nfHookLocalIn)
	body := appendAttr(hdr, nfqAttrPayload, 0x45, 0, 0)
	f.Add(append(appendNfqHeader(nil, nfqMsgPacket, 0, 1, len(body)), body...))
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			var m nfqMessage
			rest, err := nextNfqMessage(b, &m)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatalf("no progress: %d octets left of %d", len(rest), len(b))
			}
			b = rest
		}
	})
}

func TestDroppedSegmentIsSentAgain(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	dropped := map[Direction]bool{}
	tp := newTap(t, l.open(t), func(p caught) Verdict {
		if len(p.Seg.Payload) > 0 && !dropped[p.Dir] {
			dropped[p.Dir] = true
			return Drop
		}
		return Accept
	})
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	ask(t, c, "again and again")
	tp.mu.Lock()
	defer tp.mu.Unlock()
	for _, dir := range []Direction{Inbound, Outbound} {
		n := 0
		for _, p := range tp.seen {
			if p.Dir == dir && len(p.Seg.Payload) > 0 {
				n++
			}
		}
		if n < 2 {
			t.Errorf("direction %d: %d data segments, the first was dropped", dir, n)
		}
	}
}

func TestClosedQueueFailsClosed(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	tp := newTap(t, l.open(t), nil)
	r := l.install(t, labServer4)
	c := l.dial(t, labServer4)
	ask(t, c, "before")
	if err := tp.q.Close(); err != nil {
		t.Fatal(err)
	}
	send(t, c, "after")
	silent(t, c)
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	want(t, c, "after")
}

// The owner of a queue, for TestKilledOwnerFailsClosed to kill.
func TestChildQueueOwner(t *testing.T) {
	ns := os.Getenv("FTCKPT_TEST_NS")
	if ns == "" {
		t.Skip("only as a child of TestKilledOwnerFailsClosed")
	}
	l := &lab{server: ns, dev: "srv0"}
	newTap(t, l.open(t), nil)
	l.install(t, labServer4)
	fmt.Println("ready")
	select {}
}

func TestKilledOwnerFailsClosed(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	owner := child(t, "TestChildQueueOwner", "FTCKPT_TEST_NS="+l.server)
	c := l.dial(t, labServer4)
	ask(t, c, "before")
	owner.Process.Kill()
	owner.Wait()
	send(t, c, "after")
	silent(t, c)
	if rules, err := Installed(l.server, "test"); err != nil || len(rules) != 2 {
		t.Fatalf("rules left: %q, %v", rules, err)
	}
	// Who comes next takes the queue over with the connection alive ...
	tp := newTap(t, l.open(t), nil)
	want(t, c, "after")
	tp.mu.Lock()
	if tp.big == 0 {
		t.Error("nothing was caught")
	}
	tp.mu.Unlock()
	// ... and cleans up knowing no more than the name.
	if err := RemoveStale(l.server, "test"); err != nil {
		t.Fatal(err)
	}
	if rules, err := Installed(l.server, "test"); err != nil || len(rules) != 0 {
		t.Fatalf("rules left: %q, %v", rules, err)
	}
	eventually(t, "an empty queue", func() bool { n, err := tp.q.Held(); return err == nil && n == 0 })
	tp.q.Close()
	ask(t, c, "free")
}

func TestSendUpAndOut(t *testing.T) {
	for _, vip := range []netip.Addr{labServer4, labServer6} {
		t.Run(vip.String(), func(t *testing.T) {
			l := newLab(t)
			got := make(chan string, 1)
			l.serve(t, vip, func(c *net.TCPConn) {
				var b [8]byte
				_, _ = io.ReadFull(c, b[:])
				got <- string(b[:])
				_, _ = io.Copy(io.Discard, c)
			})
			tp := newTap(t, l.open(t), func(p caught) Verdict { return Accept })
			l.install(t, vip)
			c := l.dial(t, vip)
			tp.until(t, "the handshake", func() bool { return len(tp.seen) >= 3 })
			tp.mu.Lock()
			ack := tp.seen[2].Seg
			tp.mu.Unlock()

			up := AppendSegment(nil, Build{Src: ack.Tuple.Client, Dst: ack.Tuple.Server, Seq: ack.Seq, Ack: ack.Ack,
				Flags: ACK | PSH, Window: ack.Window, TS: true, TSVal: ack.Options.TSVal, TSEcr: ack.Options.TSEcr,
				Payload: []byte("injected")})
			if err := tp.q.SendUp(up); err != nil {
				t.Fatal(err)
			}
			if s := <-got; s != "injected" {
				t.Errorf("the server read %q", s)
			}

			out := AppendSegment(nil, Build{Src: ack.Tuple.Server, Dst: ack.Tuple.Client, Seq: ack.Ack, Ack: ack.Seq,
				Flags: ACK | PSH, Window: 500, TS: true, TSVal: ack.Options.TSEcr, TSEcr: ack.Options.TSVal,
				Payload: []byte("from outside")})
			if err := tp.q.SendOut(out); err != nil {
				t.Fatal(err)
			}
			want(t, c, "from outside")
			tp.mu.Lock()
			defer tp.mu.Unlock()
			for _, p := range tp.seen {
				if len(p.Seg.Payload) > 0 {
					t.Errorf("caught what was injected: direction %d, %q", p.Dir, p.Seg.Payload)
				}
			}
		})
	}
}

func TestSendRefusesWhatIsNoSegment(t *testing.T) {
	l := newLab(t)
	q := l.open(t)
	for _, ip := range [][]byte{nil, {0x45}, make([]byte, 60)} {
		if err := q.SendUp(ip); err == nil {
			t.Errorf("sent %x", ip)
		}
	}
	q.Close()
	ok := AppendSegment(nil, Build{Src: client4, Dst: server4})
	if err := q.SendOut(ok); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := q.Flush(); err != nil {
		t.Errorf("nothing to flush: %v", err)
	}
	q.Verdict(1, Accept)
	if err := q.Flush(); !errors.Is(err, ErrClosed) {
		t.Errorf("flush after Close: %v", err)
	}
}

func TestCorruptSegmentIsMarked(t *testing.T) {
	l := newLab(t)
	tp := newTap(t, l.open(t), func(caught) Verdict { return Drop })
	l.install(t, labServer4)
	from := netip.AddrPortFrom(labClient4, 5555)
	good := AppendSegment(nil, Build{Src: from, Dst: netip.AddrPortFrom(labServer4, labPort), Seq: 1, Flags: SYN})
	bad := append([]byte(nil), good...)
	bad[24]++ // sequence number
	err := nsthread.InNamed(l.client, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, p := range [][]byte{bad, good} {
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: labServer4.As4()}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	tp.until(t, "two packets", func() bool { return len(tp.seen) >= 2 })
	tp.mu.Lock()
	defer tp.mu.Unlock()
	if !tp.seen[0].Corrupt || tp.seen[1].Corrupt {
		t.Errorf("corrupt: %v %v, want true false", tp.seen[0].Corrupt, tp.seen[1].Corrupt)
	}
}

func TestFullQueueCountsItsDrops(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, echo)
	q, err := OpenNFQueue(NFQueueOptions{NetNS: l.server, Queue: labQueue, Mark: labMark, MaxPackets: 2})
	if err != nil {
		t.Fatal(err)
	}
	hold := true
	tp := newTap(t, q, func(caught) Verdict {
		if hold {
			return 0
		}
		return Accept
	})
	l.install(t, labServer4)
	type dialled struct {
		c   *net.TCPConn
		err error
	}
	done := make(chan dialled, 4)
	for range 4 { // four SYNs for two places
		go func() { c, err := l.tryDial(labServer4); done <- dialled{c, err} }()
	}
	eventually(t, "two drops", func() bool { return q.Drops() >= 2 })
	tp.until(t, "two SYNs", func() bool { return len(tp.held) >= 2 })
	tp.mu.Lock()
	hold = false
	n := len(tp.held)
	tp.mu.Unlock()
	if n != 2 {
		t.Errorf("%d held, want 2", n)
	}
	tp.release(t, n, Accept)
	for range 4 {
		d := <-done
		if d.err != nil {
			t.Fatal(d.err)
		}
		ask(t, d.c, "after all")
		d.c.Close()
	}
	before := q.Drops()
	q.Close()
	if after := q.Drops(); after != before || after < 2 {
		t.Errorf("drops %d before Close, %d after", before, after)
	}
}

func TestCloseWakesRecvAndLeaksNothing(t *testing.T) {
	l := newLab(t)
	fds := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	cycle := func() time.Duration {
		q := l.open(t)
		end := make(chan error, 1)
		go func() { _, err := q.Recv(nil); end <- err }()
		// Recv holds its lock as long as it waits.
		eventually(t, "a waiting Recv", func() bool {
			if q.recvMu.TryLock() {
				q.recvMu.Unlock()
				return false
			}
			return true
		})
		start := time.Now()
		if err := q.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-end; !errors.Is(err, ErrClosed) {
			t.Fatalf("Recv: %v", err)
		}
		if err := q.Close(); err != nil {
			t.Fatalf("second Close: %v", err)
		}
		return time.Since(start)
	}
	cycle()
	before := fds()
	for range 20 {
		if d := cycle(); d > nfqRecvTimeout*time.Second/2 {
			t.Errorf("Close took %v", d)
		}
	}
	if after := fds(); after > before {
		t.Errorf("%d file descriptors, %d before", after, before)
	}
}

func TestQueueHasOneOwner(t *testing.T) {
	l := newLab(t)
	q := l.open(t)
	o := NFQueueOptions{NetNS: l.server, Queue: labQueue, Mark: labMark}
	if _, err := OpenNFQueue(o); !errors.Is(err, unix.EPERM) {
		t.Fatalf("second owner: %v", err)
	}
	q.Close()
	q, err := OpenNFQueue(o)
	if err != nil {
		t.Fatalf("after the first has closed: %v", err)
	}
	q.Close()
	o.NetNS = "no-such-namespace"
	if _, err := OpenNFQueue(o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no namespace: %v", err)
	}
}

// What one request and answer cost through the queue: four packets, each caught,
// parsed and given its verdict.
func BenchmarkEchoThroughTheQueue(b *testing.B) {
	l := newLab(b)
	l.serve(b, labServer4, echo)
	newTap(b, l.open(b), nil)
	l.install(b, labServer4)
	c := l.dial(b, labServer4)
	var buf [100]byte
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Write(buf[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendVerdict(b *testing.B) {
	q := &NFQueue{queue: 1}
	b.ReportAllocs()
	for b.Loop() {
		q.pending = q.pending[:0]
		q.Verdict(7, Accept)
	}
}
