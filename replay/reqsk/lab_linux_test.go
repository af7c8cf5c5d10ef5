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

	"github.com/ftckpt/ftckpt/internal/seqnum"
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
	fmt.Fprintf(&script, "link set lo up\naddr add %v dev lo\n", l.prefix(l.caddr))
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
	err := tcpwrap.InNetNS(ns, func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) })
	if err != nil {
		t.Fatal(err)
	}
}

func readSysctl(t testing.TB, ns, name string) string {
	t.Helper()
	var b []byte
	err := tcpwrap.InNetNS(ns, func() (err error) { b, err = os.ReadFile("/proc/sys/" + name); return err })
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
	err := tcpwrap.InNetNS(ns, func() error {
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
		rc.Control(func(fd uintptr) { err = unix.Listen(int(fd), backlog) })
		if err != nil {
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
	err := tcpwrap.InNetNS(l.client, func() (err error) {
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

// wire sees every packet at the client, as a capture would.
type wire struct {
	mu    sync.Mutex
	conns map[stream.FourTuple]*seen
}

// seen is what the log would know of a connection, and what must not happen.
type seen struct {
	syn    stream.ConnOpen
	synack stream.ConnAccept

	ack, edge, clientNxt, serverNxt seqnum.Value
	clientTS, serverTS              uint32
	serverTSAt                      time.Time

	resets   int
	backward int            // server TSvals older than one before
	fromNew  []seqnum.Value // first octets of server data since mark
	tsNew    []serverClock  // and their clocks
	marked   bool
}

type serverClock struct {
	val uint32
	at  time.Time
}

func newWire(t testing.TB, ns string) *wire {
	t.Helper()
	fd := -1
	err := tcpwrap.InNetNS(ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(unix.ETH_P_ALL>>8|unix.ETH_P_ALL&0xff<<8))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// Not to miss a packet is a matter of room; to end, one of looking up.
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000})
	w := &wire{conns: map[stream.FourTuple]*seen{}}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 128<<10)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if n, _, err := unix.Recvfrom(fd, buf, 0); err == nil {
				w.take(bytes.Clone(buf[:n]))
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	return w
}

func (w *wire) take(ip []byte) {
	var s tcpwrap.Segment
	dir := tcpwrap.Inbound
	if tcpwrap.ParseSegment(ip, dir, &s) != nil {
		return
	}
	if s.Tuple.Server.Port() != labPort {
		dir = tcpwrap.Outbound
		tcpwrap.ParseSegment(ip, dir, &s)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.conns[s.Tuple]
	if c == nil {
		c = &seen{}
		w.conns[s.Tuple] = c
	}
	if dir == tcpwrap.Inbound {
		c.fromClient(&s)
	} else {
		c.fromServer(&s)
	}
}

func (c *seen) fromClient(s *tcpwrap.Segment) {
	if s.Options.HasTS {
		c.clientTS = s.Options.TSVal
	}
	if s.Flags.Has(tcpwrap.SYN) {
		c.syn = stream.ConnOpen{Conn: 1, Tuple: s.Tuple, ISN: s.Seq, Window: s.Window, Options: bytes.Clone(s.RawOptions)}
		c.clientNxt = s.End()
		return
	}
	c.clientNxt = seqnum.Max(c.clientNxt, s.End())
	shift := max(0, tcpwrap.ParseOptions(c.syn.Options, true).WScale)
	if tcpwrap.ParseOptions(c.synack.Options, true).WScale < 0 {
		shift = 0
	}
	c.ack = s.Ack
	c.edge = s.Ack.Add(seqnum.Size(s.Window) << shift)
}

func (c *seen) fromServer(s *tcpwrap.Segment) {
	switch {
	case s.Flags.Has(tcpwrap.RST):
		c.resets++
		return
	case s.Flags.Has(tcpwrap.SYN):
		c.synack = stream.ConnAccept{Conn: 1, ISN: s.Seq, Options: bytes.Clone(s.RawOptions)}
		c.ack, c.serverNxt = s.End(), s.End()
		c.edge = c.ack.Add(seqnum.Size(c.syn.Window))
	}
	c.serverNxt = seqnum.Max(c.serverNxt, s.End())
	now := time.Now()
	if s.Options.HasTS {
		if seqnum.Value(s.Options.TSVal).Less(seqnum.Value(c.serverTS)) && c.serverTSAt != (time.Time{}) {
			c.backward++
		}
		c.serverTS, c.serverTSAt = s.Options.TSVal, now
	}
	if c.marked {
		c.tsNew = append(c.tsNew, serverClock{s.Options.TSVal, now})
		if len(s.Payload) > 0 {
			c.fromNew = append(c.fromNew, s.Seq)
		}
	}
}

// of returns a copy of what was seen of a connection.
func (w *wire) of(t stream.FourTuple) seen {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c := w.conns[t]; c != nil {
		return *c
	}
	return seen{}
}

func (w *wire) mark(t stream.FourTuple) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[t].marked = true
}

// settled waits until the client has acknowledged what the server sent and the
// other way round, and what it was is known.
func (w *wire) settled(t testing.TB, k *talker) seen {
	t.Helper()
	var c seen
	eventually(t, "the conversation to settle", func() bool {
		c = w.of(k.tuple)
		return c.clientNxt == c.syn.ISN.Add(seqnum.Size(len(k.sent)+1)) && c.ack == c.synack.ISN.Add(seqnum.Size(k.got+1))
	})
	return c
}

func (c *seen) attrs(t testing.TB) Attrs {
	t.Helper()
	elapsed := uint32(time.Since(c.serverTSAt).Milliseconds())
	a, err := AttrsFrom(c.syn, c.synack, c.clientTS, c.serverTS+elapsed+1)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// gate stands between the new server and the network: it holds all until live,
// and meanwhile swallows what the client has already.
type gate struct {
	q     *tcpwrap.NFQueue
	rules tcpwrap.Rules
	end   chan error

	mu     sync.Mutex
	live   bool
	held   []tcpwrap.PacketID
	swall  map[stream.FourTuple]*swallow
	linger time.Duration // between Want and the ACK
	resets int           // of the new server's TCP, dropped
	out    int           // packets of the new server's TCP
}

type swallow struct {
	a        Attrs
	ack      seqnum.Value // the client's
	edge     seqnum.Value
	kAck     seqnum.Value // the new TCP's
	kNxt     seqnum.Value
	clientTS uint32
}

func (l *lab) gate(t testing.TB) *gate {
	t.Helper()
	q, err := tcpwrap.OpenNFQueue(tcpwrap.NFQueueOptions{NetNS: l.new, Queue: 91, Mark: labMark})
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{q: q, end: make(chan error, 1), swall: map[stream.FourTuple]*swallow{},
		rules: tcpwrap.Rules{Name: "reqsk", VIP: l.vip, Ports: []uint16{labPort}, Dev: "dev0", Queue: 91, Mark: labMark, NetNS: l.new}}
	if err := g.rules.Install(); err != nil {
		t.Fatal(err)
	}
	go func() { g.end <- g.loop() }()
	t.Cleanup(func() {
		q.Close()
		if err := <-g.end; err != nil {
			t.Errorf("gate: %v", err)
		}
	})
	return g
}

func (g *gate) loop() error {
	var pkts []tcpwrap.Packet
	for {
		var err error
		if pkts, err = g.q.Recv(pkts[:0]); err != nil {
			if errors.Is(err, tcpwrap.ErrClosed) {
				return nil
			}
			return err
		}
		g.mu.Lock()
		for _, p := range pkts {
			if err := g.packet(p); err != nil {
				g.mu.Unlock()
				return err
			}
		}
		g.mu.Unlock()
		if err := g.q.Flush(); err != nil && !errors.Is(err, tcpwrap.ErrClosed) {
			return err
		}
	}
}

func (g *gate) packet(p tcpwrap.Packet) error {
	var s tcpwrap.Segment
	if err := tcpwrap.ParseSegment(p.Data, p.Dir, &s); err != nil {
		return err
	}
	if p.Dir == tcpwrap.Outbound {
		g.out++
		if s.Flags.Has(tcpwrap.RST) && !g.live {
			g.resets++
			g.q.Verdict(p.ID, tcpwrap.Drop)
			return nil
		}
	}
	w := g.swall[s.Tuple]
	if g.live {
		g.q.Verdict(p.ID, tcpwrap.Accept)
		return nil
	}
	if p.Dir == tcpwrap.Inbound || w == nil {
		g.held = append(g.held, p.ID)
		return nil
	}
	w.kNxt, w.kAck = seqnum.Max(w.kNxt, s.End()), seqnum.Max(w.kAck, s.Ack)
	if w.ack.Less(s.End()) {
		g.held = append(g.held, p.ID)
		return nil
	}
	g.q.Verdict(p.ID, tcpwrap.Drop)
	if s.Len() > 0 {
		return g.inject(s.Tuple, w, w.kAck, nil)
	}
	return nil
}

// inject plays the client to the new TCP. g.mu is held.
func (g *gate) inject(t stream.FourTuple, w *swallow, seq seqnum.Value, data []byte) error {
	o := w.a.ACK(t, w.edge)
	o.Seq, o.Ack, o.Payload, o.TSVal = seq, seqnum.Min(w.kNxt, w.ack), data, w.clientTS
	if len(data) > 0 {
		o.Flags |= tcpwrap.PSH
	}
	return g.q.SendUp(tcpwrap.AppendOutgoing(nil, &o))
}

// sendACK gives the new TCP the packet that re-creates a connection.
func (g *gate) sendACK(t testing.TB, tuple stream.FourTuple, c *seen, a Attrs) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.swall[tuple] = &swallow{a: a, ack: c.ack, edge: c.edge, clientTS: c.clientTS,
		kAck: a.ClientISN.Add(1), kNxt: a.ServerISN.Add(1)}
	o := a.ACK(tuple, c.edge)
	if err := g.q.SendUp(tcpwrap.AppendOutgoing(nil, &o)); err != nil {
		t.Fatal(err)
	}
}

// recreate makes one connection.
func (g *gate) recreate(t testing.TB, r *Recreator, k *talker, c *seen) {
	t.Helper()
	a := c.attrs(t)
	if err := r.Want(k.tuple, a); err != nil {
		t.Fatal(err)
	}
	if err := r.Result(k.tuple); !errors.Is(err, ErrWaiting) {
		t.Fatalf("before the ACK: %v", err)
	}
	time.Sleep(g.linger)
	g.sendACK(t, k.tuple, c, a)
	eventually(t, "a socket for the connection", func() bool {
		st, err := r.State(k.tuple)
		if err != nil {
			t.Fatal(err)
		}
		return st == tcpwrap.TCPEstablished
	})
	if err := r.Result(k.tuple); err != nil {
		t.Fatal(err)
	}
}

// replay injects what the client said by the time of c.
func (g *gate) replay(t testing.TB, k *talker, c *seen) {
	t.Helper()
	g.mu.Lock()
	w := g.swall[k.tuple]
	first := w.a.ClientISN.Add(1)
	logged := k.sent[:first.To(c.clientNxt)]
	for at := 0; at < len(logged); {
		n := min(1000, len(logged)-at)
		if err := g.inject(k.tuple, w, first.Add(seqnum.Size(at)), logged[at:at+n]); err != nil {
			t.Fatal(err)
		}
		at += n
	}
	g.mu.Unlock()
	eventually(t, "the replay to catch up", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return w.ack.LessEq(w.kNxt) && c.clientNxt.LessEq(w.kAck)
	})
}

// goLive lets everything through.
func (g *gate) goLive(t testing.TB) {
	t.Helper()
	g.mu.Lock()
	g.live = true
	for _, id := range g.held {
		g.q.Verdict(id, tcpwrap.Accept)
	}
	g.held = nil
	g.mu.Unlock()
	if err := g.q.Flush(); err != nil {
		t.Fatal(err)
	}
}

// cut takes the old server off the network, both ways and without a word, and
// sends the client's packets to the new one.
func (l *lab) cut(t testing.TB) {
	t.Helper()
	r := tcpwrap.Rules{Name: "cut", VIP: l.vip, Ports: []uint16{labPort}, Queue: 1, Mark: 1, NetNS: l.old}
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
