package reqsk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// ghost is a connection nobody has: the new side alone is of interest.
type ghost struct {
	t stream.FourTuple
	c seen
	a Attrs
}

func (l *lab) ghost(port uint16) *ghost {
	g := &ghost{t: stream.FourTuple{Server: netip.AddrPortFrom(l.vip, labPort), Client: netip.AddrPortFrom(l.caddr, port)}}
	g.a = Attrs{ClientISN: seqnum.Value(port) << 20, ServerISN: ^seqnum.Value(0), MSS: 1440, // wraps at once
		TSOK: true, SACKOK: true, WScaleOK: true, SndWScale: 7, RcvWScale: 9, ClientTSVal: 5, ServerTSVal: 6}
	g.c = seen{ack: g.a.ServerISN.Add(1), edge: g.a.ServerISN.Add(1 << 16)}
	return g
}

func (x *ghost) want(t testing.TB, r *Recreator) {
	t.Helper()
	if err := r.Want(x.t, x.a); err != nil {
		t.Fatal(err)
	}
}

// seenBy waits for the result of the ghost's ACK.
func (x *ghost) seenBy(t testing.TB, r *Recreator) error {
	t.Helper()
	var err error
	eventually(t, "the ACK to be seen", func() bool {
		err = r.Result(x.t)
		return !errors.Is(err, ErrWaiting)
	})
	return err
}

func (x *ghost) state(t testing.TB, r *Recreator) tcpwrap.TCPState {
	t.Helper()
	st, err := r.State(x.t)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// silent wants that the new TCP has sent nothing at all: an ACK of nobody's
// draws a reset, and that is the first packet there is.
func (g *gate) silent(t testing.TB, l *lab) {
	t.Helper()
	stray := l.ghost(9)
	g.sendACK(t, stray.t, &stray.c, stray.a)
	var out, resets int
	eventually(t, "a reset for a stray ACK", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		out, resets = g.out, g.resets
		return resets > 0
	})
	if out != 1 {
		t.Errorf("the new TCP sent %d packets, %d of them resets, where one answers the stray ACK", out, resets)
	}
}

func TestNoListener(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		l := newLab(t, v6)
		g, r, x := l.gate(t), l.recreator(t), l.ghost(1000)
		if err := r.Result(x.t); !errors.Is(err, ErrUnwanted) {
			t.Fatalf("before Want: %v", err)
		}
		x.want(t, r)
		g.sendACK(t, x.t, &x.c, x.a)
		if err := x.seenBy(t, r); !errors.Is(err, ErrNoListener) {
			t.Fatalf("without a listener: %v", err)
		}
		if st := x.state(t, r); st != 0 {
			t.Errorf("socket in state %v", st)
		}
		g.silent(t, l)

		// The same ACK does it as soon as there is one.
		l.listen(t, l.new, map[bool]string{false: "tcp4", true: "tcp6"}[v6], 0)
		if st := x.state(t, r); st != 0 {
			t.Errorf("socket in state %v: the listener is none", st)
		}
		g.sendACK(t, x.t, &x.c, x.a)
		eventually(t, "the connection", func() bool { return x.state(t, r) == tcpwrap.TCPEstablished })
		if err := r.Result(x.t); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Counts(); err != nil || n != (Counts{Assigned: 1, NoListener: 1}) {
			t.Errorf("%+v (%v)", n, err)
		}
		if err := errors.Join(r.Forget(x.t), r.Forget(x.t)); err != nil {
			t.Fatal(err)
		}
		if err := r.Result(x.t); !errors.Is(err, ErrUnwanted) {
			t.Fatalf("after Forget: %v", err)
		}
	}
}

func TestTaken(t *testing.T) {
	l := newLab(t, false)
	ln := l.listen(t, l.new, "tcp4", 0)
	g, r, x := l.gate(t), l.recreator(t), l.ghost(1000)
	x.want(t, r)
	for range 3 { // the second and third are ordinary ACKs to the socket
		g.sendACK(t, x.t, &x.c, x.a)
	}
	eventually(t, "the connection", func() bool { return x.state(t, r) == tcpwrap.TCPEstablished })
	x.want(t, r)
	g.sendACK(t, x.t, &x.c, x.a)
	if err := x.seenBy(t, r); !errors.Is(err, ErrTaken) {
		t.Fatalf("second time: %v", err)
	}
	if n, err := r.Counts(); err != nil || n != (Counts{Assigned: 1, Taken: 1}) {
		t.Errorf("%+v (%v)", n, err)
	}
	if c := accept(t, ln); c.RemoteAddr().String() != x.t.Client.String() {
		t.Errorf("accepted %v", c.RemoteAddr())
	}
	g.silent(t, l)
}

// TestFullQueue shows what a full accept queue does: nothing is said, no
// socket is made, and both can be asked for again.
func TestFullQueue(t *testing.T) {
	l := newLab(t, false)
	ln := l.listen(t, l.new, "tcp4", 1) // has room for two
	g, r := l.gate(t), l.recreator(t)
	var xs []*ghost
	for i := range 3 {
		x := l.ghost(uint16(1000 + i))
		x.want(t, r)
		g.sendACK(t, x.t, &x.c, x.a)
		if err := x.seenBy(t, r); err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			eventually(t, "the connection", func() bool { return x.state(t, r) == tcpwrap.TCPEstablished })
		}
		xs = append(xs, x)
	}
	x := xs[2]
	eventually(t, "the kernel to count an overflow", func() bool { return overflows(t, l.new) == "1" })
	if st := x.state(t, r); st != 0 {
		t.Fatalf("third connection in state %v with room for two", st)
	}
	accept(t, ln)
	x.want(t, r)
	g.sendACK(t, x.t, &x.c, x.a)
	eventually(t, "the third connection", func() bool { return x.state(t, r) == tcpwrap.TCPEstablished })
	g.silent(t, l)
}

// overflows is the namespace's TcpExtListenOverflows.
func overflows(t testing.TB, ns string) string {
	t.Helper()
	lines := strings.Split(run(t, "ip", "netns", "exec", ns, "cat", "/proc/net/netstat"), "\n")
	i := slices.Index(strings.Fields(lines[0]), "ListenOverflows")
	if i < 0 {
		t.Fatalf("no ListenOverflows in %s", lines[0])
	}
	return strings.Fields(lines[1])[i]
}

// TestOtherPackets wants that only the very ACK counts: what else there is of
// a wanted connection goes to TCP as it is, which answers with a reset.
func TestOtherPackets(t *testing.T) {
	l := newLab(t, false)
	l.listen(t, l.new, "tcp4", 0)
	g, r, x := l.gate(t), l.recreator(t), l.ghost(1000)
	x.want(t, r)
	ack := x.a.ACK(x.t, x.c.edge)
	n := 0
	for name, change := range map[string]func(o *tcpwrap.Outgoing){
		"other sequence number": func(o *tcpwrap.Outgoing) { o.Seq++ },
		"other acknowledgement": func(o *tcpwrap.Outgoing) { o.Ack++ },
		"with payload":          func(o *tcpwrap.Outgoing) { o.Payload = []byte("x") },
		"with FIN":              func(o *tcpwrap.Outgoing) { o.Flags |= tcpwrap.FIN },
		"other client":          func(o *tcpwrap.Outgoing) { o.Tuple = l.ghost(1001).t },
	} {
		o := ack
		change(&o)
		if err := g.q.SendUp(tcpwrap.AppendOutgoing(nil, &o)); err != nil {
			t.Fatal(err)
		}
		n++
		eventually(t, "TCP's reset for an ACK "+name, func() bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			return g.resets == n
		})
		if err := r.Result(x.t); !errors.Is(err, ErrWaiting) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, fl := range []tcpwrap.Flags{tcpwrap.SYN | tcpwrap.ACK, tcpwrap.RST | tcpwrap.ACK, tcpwrap.RST, tcpwrap.PSH} {
		o := ack
		o.Flags = fl
		if err := g.q.SendUp(tcpwrap.AppendOutgoing(nil, &o)); err != nil {
			t.Fatal(err)
		}
	}
	g.sendACK(t, x.t, &x.c, x.a)
	eventually(t, "the connection", func() bool { return x.state(t, r) == tcpwrap.TCPEstablished })
	if n, err := r.Counts(); err != nil || n != (Counts{Assigned: 1}) {
		t.Errorf("%+v (%v)", n, err)
	}
}

// TestRefusals are the ways in which a listener or the network say no.
func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		listen func(*testing.T, *lab)
		spoil  func(*testing.T, *lab)
		repair func(*testing.T, *lab) // for what silent sends
		want   error                  // of Result
	}{
		"mptcp listener": {
			listen: func(t *testing.T, l *lab) {
				if readSysctl(t, l.new, "net/mptcp/enabled") != "1" {
					t.Skip("no MPTCP")
				}
				var lc net.ListenConfig
				lc.SetMultipathTCP(true)
				l.listenWith(t, &lc)
			},
			want: unix.EINVAL,
		},
		"listener bound to a device": {
			listen: func(t *testing.T, l *lab) {
				lc := plainTCP()
				lc.Control = func(_, _ string, c syscall.RawConn) (err error) {
					cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "dev0") })
					return errors.Join(cerr, err)
				}
				l.listenWith(t, lc)
			},
			want: ErrNoListener,
		},
		"timestamps switched off behind our back": {
			listen: func(t *testing.T, l *lab) { l.listen(t, l.new, "tcp4", 0) },
			spoil:  func(t *testing.T, l *lab) { sysctl(t, l.new, "net/ipv4/tcp_timestamps", "0") },
			want:   unix.EINVAL,
		},
		"no route to the client": { // assigned, and then nothing
			listen: func(t *testing.T, l *lab) { l.listen(t, l.new, "tcp4", 0) },
			spoil:  func(t *testing.T, l *lab) { batch(t, l.new, fmt.Sprintf("route del %v\n", l.prefix(l.caddr))) },
			repair: func(t *testing.T, l *lab) { batch(t, l.new, fmt.Sprintf("route add %v dev dev0\n", l.prefix(l.caddr))) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, false)
			tc.listen(t, l)
			g, r, x := l.gate(t), l.recreator(t), l.ghost(1000)
			x.want(t, r)
			if tc.spoil != nil {
				tc.spoil(t, l)
			}
			g.sendACK(t, x.t, &x.c, x.a)
			if err := x.seenBy(t, r); !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if st := x.state(t, r); st != 0 {
				t.Errorf("socket in state %v", st)
			}
			if tc.repair != nil {
				tc.repair(t, l)
			}
			g.silent(t, l)
		})
	}
}

func (l *lab) listenWith(t *testing.T, lc *net.ListenConfig) {
	t.Helper()
	err := nsthread.InNamed(l.new, func() error {
		ln, err := lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(l.vip, labPort).String())
		if err == nil {
			t.Cleanup(func() { ln.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestClose wants the program to be gone: the ACK is one like any other.
func TestClose(t *testing.T) {
	l := newLab(t, false)
	l.listen(t, l.new, "tcp4", 0)
	g, r, x := l.gate(t), l.recreator(t), l.ghost(1000)
	x.want(t, r)
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	g.sendACK(t, x.t, &x.c, x.a)
	eventually(t, "TCP's reset", func() bool { g.mu.Lock(); defer g.mu.Unlock(); return g.resets == 1 })
}

func TestOpenErrors(t *testing.T) {
	needKernel(t)
	if _, err := Open("no-such-namespace"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("unknown namespace: %v", err)
	}
	l := newLab(t, false)
	batch(t, l.new, "link set lo down\n")
	if _, err := Open(l.new); err == nil {
		t.Error("lo is down, and no error")
	}
}

// TestUnacknowledgedSYNACK is a handshake cut in the middle: the old server
// has sent a SYN-ACK that the client never got. The new one has the connection
// as established; sending the logged SYN-ACK again joins the client to it.
func TestUnacknowledgedSYNACK(t *testing.T) {
	l := newLab(t, false)
	server(t, l.listen(t, l.old, "tcp4", 0))
	l.deafen(t, "-A")
	type dialled struct {
		c   net.Conn
		err error
	}
	done := make(chan dialled, 1)
	local := netip.AddrPortFrom(l.caddr, 2000)
	go func() {
		var d dialled
		d.err = nsthread.InNamed(l.client, func() (err error) {
			nd := net.Dialer{Timeout: deadline, LocalAddr: net.TCPAddrFromAddrPort(local)}
			d.c, err = nd.Dial("tcp4", netip.AddrPortFrom(l.vip, labPort).String())
			return err
		})
		done <- d
	}()
	tuple := stream.FourTuple{Server: netip.AddrPortFrom(l.vip, labPort), Client: local}
	var c seen
	eventually(t, "the old server's SYN-ACK", func() bool { c = l.wire.of(tuple); return len(c.synack.Options) > 0 })

	g := l.gate(t)
	l.cut(t)
	ln := l.listen(t, l.new, "tcp4", 0)
	r := l.recreator(t)
	k := &talker{tuple: tuple}
	g.recreate(t, r, k, &c)
	server(t, ln)
	l.deafen(t, "-D")
	g.goLive(t)
	err := g.q.SendOut(tcpwrap.AppendSegment(nil, tcpwrap.Build{Src: tuple.Server, Dst: tuple.Client,
		Seq: c.synack.ISN, Ack: c.syn.ISN.Add(1), Flags: tcpwrap.SYN | tcpwrap.ACK, Window: 65535, Options: c.synack.Options}))
	if err != nil {
		t.Fatal(err)
	}
	d := <-done
	if d.err != nil {
		t.Fatal(d.err)
	}
	k.TCPConn = d.c.(*net.TCPConn)
	defer k.Close()
	k.talk(t, 200<<10)
	if after := l.wire.of(tuple); after.resets > 0 || after.synack.ISN != c.synack.ISN {
		t.Errorf("%d resets, server ISN %d, was %d", after.resets, after.synack.ISN, c.synack.ISN)
	}
}

// deafen drops what comes to the client from the service (-A), or no longer
// (-D).
func (l *lab) deafen(t testing.TB, op string) {
	t.Helper()
	run(t, "ip", "netns", "exec", l.client, "iptables", "-w", op, "INPUT", "-p", "tcp", "-s", l.vip.String(), "-j", "DROP")
}

// BenchmarkRecreate is one connection after the other, each looked up, as long
// as nobody accepts.
func BenchmarkRecreate(b *testing.B) {
	l := newLab(b, false)
	sysctl(b, l.new, "net/core/somaxconn", "1000000")
	l.listen(b, l.new, "tcp4", 1000000)
	g, r := l.gate(b), l.recreator(b)
	var xs []*ghost
	for i := range min(b.N, 60000) {
		xs = append(xs, l.ghost(uint16(1+i)))
	}
	if b.N > len(xs) {
		b.Skip("not that many ports")
	}
	b.ResetTimer()
	for _, x := range xs {
		x.want(b, r)
		g.sendACK(b, x.t, &x.c, x.a)
		eventually(b, "the connection", func() bool { return x.state(b, r) == tcpwrap.TCPEstablished })
	}
}

func BenchmarkProbe(b *testing.B) {
	needKernel(b)
	for b.Loop() {
		if s, err := Probe(); s != Yes {
			b.Fatal(err)
		}
	}
}
