package reqsk

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

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
		rules: tcpwrap.Rules{Name: "reqsk", VIPs: []netip.Addr{l.vip}, Ports: []uint16{labPort}, Dev: "dev0", Queue: 91, Mark: labMark, NetNS: l.new}}
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
