package replay_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// client is a real client: it must not notice a thing.
type client struct {
	name  int
	ep    *tcptest.Endpoint
	said  []byte
	heard []byte
	gone  bool // it has reset the connection
	told  bool // the recovery said that it would reset it
}

// closesAt is how many octets the app of a name hears before it ends what it says,
// for good, while it goes on listening; 0 is never.
func closesAt(name int) int {
	if name%3 == 1 {
		return 40 * name
	}
	return 0
}

// hears is what an app says to what it hears. It answers true when it has said
// its last.
func hears(a *tcptest.App, p []byte) (out []byte, last bool) {
	limit := closesAt(a.Name)
	if limit == 0 || a.Heard+len(p) < limit {
		return a.Hears(p), false
	}
	out = a.Hears(p[:max(limit-a.Heard, 0)])
	a.Heard = limit
	return out, true
}

// expects is what a client hears from a server that never fails.
func (c *client) expects() []byte {
	a := tcptest.App{Name: c.name}
	out, last := hears(&a, c.said)
	if last || c.ep.Closed {
		out = append(out, tcptest.Bye...)
	}
	return out
}

// served is a connection on the server's host.
type served struct {
	ep       *tcptest.Endpoint
	app      tcptest.App
	accepted bool // by the server; before that it is in no image
}

func (s *served) copy(clock func() uint32, rewound, boast bool) *served {
	return &served{ep: s.ep.Restored(clock, rewound, boast), app: s.app, accepted: true}
}

// generation is a checkpoint with what the node puts into its manifest.
type generation struct {
	rec        stream.Generation
	socks      []*served
	cuts       []tcpwrap.Cut
	unaccepted map[stream.ConnID]bool
	at         time.Time
	pos        stream.Position // of its record
	nextConn   stream.ConnID   // as the manifest has it
}

// caught is a packet that waits for its verdict.
type caught struct {
	seg tcpwrap.Segment
	dep stream.Position
}

// world is a service, its clients, the network between them, the log, and a
// primary whose host dies.
type world struct {
	t       *rapid.T
	rnd     *rand.Rand
	now     time.Time
	clients []*client
	host    map[stream.FourTuple]*served
	order   []stream.FourTuple

	machine *tcpwrap.Machine
	engine  *replay.Engine
	ledger  *replay.Ledger

	log    []stream.Record // log[i] is at position i+1
	dep    stream.Position
	stable stream.Position
	fed    int // records the ledger has
	gens   []*generation

	boasted  bool // a restored TCP may have offered far too much
	id       tcpwrap.PacketID
	waits    map[tcpwrap.PacketID]*caught
	toServer []tcpwrap.Segment
	toClient []tcpwrap.Segment
	frozen   bool
	silent   bool // the recovery must not speak to clients yet, but for greetings
	slow     int  // how seldom the apps read, 1 is always
	lazy     int  // how seldom the clients read; 0 is always
	strict   bool
	overruns int // one in so many segments is dropped for want of memory, 0: none
}

// between draws evenly, which rapid by itself does not: it shrinks to fewer
// steps, not to smaller ones.
func (w *world) between(low, high int) int { return low + w.rnd.IntN(high-low+1) }

// chance is true once in so many times.
func (w *world) chance(in int) bool { return w.rnd.IntN(in) == 0 }

func (w *world) clock() uint32 { return uint32(w.now.UnixMilli()) }

var vip = netip.MustParseAddrPort("198.51.100.1:80")

func tupleOf(name int) stream.FourTuple {
	return stream.FourTuple{Server: vip, Client: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(40000+name))}
}

func (w *world) config(name int, server bool) tcptest.Config {
	c := tcptest.Config{
		Tuple: tupleOf(name), Server: server,
		ISN:    seqnum.Value(w.rnd.Uint32() | uint32(w.between(0, 1)*0xffffff00)), // half of them are about to wrap
		Buffer: w.between(60, 1500), Scale: uint8(w.between(0, 3)),
		MSS: 120, TS: rapid.Bool().Draw(w.t, "timestamps"), Strict: w.strict, Clock: w.clock,
	}
	if server {
		c.Overrun = w.overrun
	}
	return c
}

func (w *world) overrun() bool { return w.overruns > 0 && w.chance(w.overruns) }

// dial makes a new client.
func (w *world) dial() {
	c := &client{name: len(w.clients)}
	c.ep = tcptest.Dial(w.config(c.name, false))
	w.clients = append(w.clients, c)
	w.listen(c)
}

func (w *world) listen(c *client) {
	w.toServer = append(w.toServer, c.ep.Out...)
	c.ep.Out = nil
	if w.lazy == 0 || w.chance(w.lazy) { // else its window shuts
		c.heard = append(c.heard, c.ep.Read(1<<20)...)
	}
	if want := c.expects(); !bytes.HasPrefix(want, c.heard) {
		i := 0
		for i < len(want) && i < len(c.heard) && want[i] == c.heard[i] {
			i++
		}
		w.t.Fatalf("client %d heard a wrong octet: number %d of %d", c.name, i, len(c.heard))
	}
	// A host that has nothing left to say does not carry TIME_WAIT over: the last
	// acknowledgement, when it was lost, is a reset then.
	finished := c.ep.Closed && c.ep.PeerClosed && len(c.heard) == len(c.expects())
	if c.ep.State == tcptest.Reset && !c.gone && !c.told && !finished {
		w.t.Fatalf("client %d was reset", c.name)
	}
}

func (w *world) clientOf(t stream.FourTuple) *client { return w.clients[t.Client.Port()-40000] }

// catch is a packet on its way through the host, in either direction.
func (w *world) catch(s tcpwrap.Segment) {
	w.id++
	w.t.Logf("catch %d: dir %d client %d seq %d ack %d flags %#x win %d, %d octets", w.id, s.Dir, s.Tuple.Client.Port()-40000, s.Seq, s.Ack, s.Flags, s.Window, len(s.Payload))
	if w.machine == nil && w.engine == nil {
		return // a dead host
	}
	w.waits[w.id] = &caught{s, w.dep}
	own := s
	own.Payload = bytes.Clone(s.Payload)
	switch {
	case w.engine != nil && w.frozen && w.engine.Owns(s.Tuple):
		delete(w.waits, w.id) // as the node does
	case w.engine != nil && w.engine.Owns(s.Tuple) && w.engine.Packet(w.now, w.id, &own):
	default:
		w.machine.Packet(w.now, w.id, &own, false)
	}
	w.carryOut()
	for i := range own.Payload {
		own.Payload[i] = 0xee
	}
}

// carryOut does what the machine and the engine want done, in the order they
// ask for.
func (w *world) carryOut() {
	if w.machine != nil {
		w.perform(&w.machine.Ready, false)
	}
	if w.engine != nil {
		for {
			w.perform(&w.engine.Ready, true)
			births := w.engine.Births
			w.engine.Births = nil
			if len(births) == 0 {
				break
			}
			for _, b := range births {
				if w.bear(b); !w.chance(3) { // else it asks again
					w.engine.Delivered(w.now, b.Open.Conn)
				}
			}
		}
	}
}

func (w *world) perform(r *tcpwrap.Ready, replaying bool) {
	records := slices.Clone(r.Records)
	segments := slices.Clone(r.Segments)
	verdicts := slices.Clone(r.Verdicts)
	for _, n := range records {
		w.t.Logf("record %d: %T%v", n.Pos, n.Record, n.Record)
		if int(n.Pos) != len(w.log)+1 {
			w.t.Fatalf("record at %d, want %d", n.Pos, len(w.log)+1)
		}
		switch x := n.Record.(type) {
		case stream.Bytes:
			x.Payload = bytes.Clone(x.Payload)
			n.Record, w.dep = x, n.Pos
		case stream.ConnOpen, stream.ConnAccept, stream.ClientFin, stream.ClientReset:
			w.dep = n.Pos
		}
		w.log = append(w.log, n.Record)
	}
	var packets [][]byte
	for i := range segments {
		packets = append(packets, tcpwrap.AppendOutgoing(nil, &segments[i]))
	}
	r.Reset()
	for i := range segments {
		w.made(&segments[i], packets[i])
	}
	for _, v := range verdicts {
		w.verdict(v, replaying)
	}
}

// made sends a segment that a machine made by itself.
func (w *world) made(o *tcpwrap.Outgoing, ip []byte) {
	w.t.Logf("made: up %v client %d seq %d ack %d flags %#x win %d, %d octets", o.Up, o.Tuple.Client.Port()-40000, o.Seq, o.Ack, o.Flags, o.Window, len(o.Payload))
	dir := tcpwrap.Inbound
	if !o.Up {
		dir = tcpwrap.Outbound
	}
	if o.Unreachable {
		w.prompted(o)
		return
	}
	var s tcpwrap.Segment
	if err := tcpwrap.ParseSegment(ip, dir, &s); err != nil {
		w.t.Fatalf("a segment that is none: %v", err)
	}
	if o.Up {
		w.up(&s)
		return
	}
	s.Window = uint16(min(int(s.Window), 60)) // as if the window were what is here
	if len(s.Payload) > 0 || s.Flags.Has(tcpwrap.FIN) {
		w.t.Fatal("octets that no server sent")
	}
	if c := w.clientOf(s.Tuple); w.silent && s.Flags.Has(tcpwrap.RST) && !c.told && !c.gone {
		w.t.Fatal("a reset before go-live")
	}
	w.promise(&s)
	if w.silent && !w.boasted && !o.Flags.Has(tcpwrap.SYN) && o.Window > 1508 { // the largest buffer, rounded up
		w.t.Fatalf("client %d hears of a window of %d, which it was never given", o.Tuple.Client.Port()-40000, o.Window)
	}
	w.toClient = append(w.toClient, s)
}

// prompted is an ICMP destination unreachable: a client with octets outstanding
// from there on sends them again.
func (w *world) prompted(o *tcpwrap.Outgoing) {
	c := w.clientOf(o.Tuple)
	if c.ep.Una == o.Seq && c.ep.Resend(120) {
		w.listen(c)
	}
}

// promise is the first one: what is acknowledged to a client is stable.
func (w *world) promise(s *tcpwrap.Segment) {
	if c := w.clientOf(s.Tuple); !s.Flags.Has(tcpwrap.ACK) || s.Flags.Has(tcpwrap.RST) || c.gone || c.ep.State == tcptest.Reset {
		return
	}
	var id stream.ConnID
	edge, known := seqnum.Value(0), false
	for _, r := range w.log[:w.stable] {
		switch r := r.(type) {
		case stream.ConnOpen:
			if r.Tuple == s.Tuple {
				id, edge, known = r.Conn, r.ISN.Add(1), true
			}
		case stream.Generation:
			for _, c := range w.gens[r.ID-1].cuts {
				if c.Tuple == s.Tuple && (!known || c.Conn != id) {
					id, edge, known = c.Conn, c.RcvNxt, true
				}
			}
		case stream.Bytes:
			if end := r.Seq.Add(seqnum.Size(len(r.Payload))); r.Conn == id && r.Seq.LessEq(edge) {
				edge = seqnum.Max(edge, end)
			}
		case stream.ClientFin:
			if r.Conn == id && r.Seq == edge {
				edge = edge.Add(1)
			}
		}
	}
	if known && edge.Less(s.Ack) {
		w.t.Fatalf("client %d hears that %d is acknowledged, and the log is stable up to %d", s.Tuple.Client.Port()-40000, s.Ack, edge)
	}
}

func (w *world) verdict(v tcpwrap.Decision, replaying bool) {
	c := w.waits[v.ID]
	if c == nil {
		w.t.Fatalf("packet %d got a verdict and was not waiting", v.ID)
	}
	w.t.Logf("verdict %d: %d", v.ID, v.Verdict)
	delete(w.waits, v.ID)
	if v.Verdict == tcpwrap.Drop {
		return
	}
	if c.seg.Dir == tcpwrap.Inbound {
		if w.silent {
			w.t.Fatal("a client's packet overtook the log")
		}
		w.up(&c.seg)
		return
	}
	if w.silent {
		w.t.Fatal("a packet left before go-live")
	}
	if !replaying && c.dep > w.stable {
		w.t.Fatalf("packet %d left at %d and depends on %d", v.ID, w.stable, c.dep)
	}
	w.promise(&c.seg)
	w.toClient = append(w.toClient, c.seg)
}

// up gives the host's TCP a segment.
func (w *world) up(s *tcpwrap.Segment) {
	h := w.host[s.Tuple]
	switch {
	case h != nil && h.ep.State != tcptest.Reset:
		h.ep.Receive(s)
	case s.Flags.Has(tcpwrap.SYN) && !s.Flags.Has(tcpwrap.ACK) && len(w.host) > 0 || w.listening(s):
		h = &served{ep: tcptest.Answer(w.config(int(s.Tuple.Client.Port()-40000), true), s), app: tcptest.App{Name: int(s.Tuple.Client.Port() - 40000)}}
		w.host[s.Tuple] = h
		w.order = append(w.order, s.Tuple)
	default:
		if r, ok := tcptest.Refusal(s); ok {
			w.catch(r)
		}
		return
	}
	w.speak(h)
}

func (w *world) listening(s *tcpwrap.Segment) bool {
	return s.Flags.Has(tcpwrap.SYN) && !s.Flags.Has(tcpwrap.ACK)
}

func (w *world) speak(h *served) {
	out := h.ep.Out
	h.ep.Out = nil
	for _, s := range out {
		w.catch(s)
	}
}

func (w *world) bear(b replay.Birth) {
	w.t.Logf("birth of %d", b.Open.Conn)
	if h := w.host[b.Open.Tuple]; h != nil {
		return
	}
	name := int(b.Open.Tuple.Client.Port() - 40000)
	cfg := w.config(name, true)
	born := w.now
	cfg.Clock = func() uint32 { return b.ServerTS + uint32(w.now.Sub(born).Milliseconds()) }
	w.host[b.Open.Tuple] = &served{ep: tcptest.Reborn(cfg, b.Open, b.Accept, b.Edge), app: tcptest.App{Name: name}}
	w.order = append(w.order, b.Open.Tuple)
}

// deliver takes a packet off the wire; reliable neither loses nor reorders.
func (w *world) deliver(wire *[]tcpwrap.Segment, reliable bool, to func(s *tcpwrap.Segment)) {
	if len(*wire) == 0 {
		return
	}
	i := 0
	if !reliable && w.chance(3) {
		i = w.between(0, len(*wire)-1)
	}
	s := (*wire)[i]
	if reliable || !w.chance(9) {
		*wire = slices.Delete(*wire, i, i+1)
	}
	if reliable || !w.chance(8) {
		to(&s)
	}
}

func (w *world) toClientNow(s *tcpwrap.Segment) {
	c := w.clientOf(s.Tuple)
	c.ep.Receive(s)
	w.listen(c)
}

func (w *world) toServerNow(s *tcpwrap.Segment) { w.catch(*s) }

// serve lets a server's end do something; a frozen one does nothing.
func (w *world) serve(t stream.FourTuple) {
	h := w.host[t]
	if h == nil || w.frozen {
		return
	}
	if h.ep.State == tcptest.Established && w.chance(w.slow) {
		h.accepted = true
		p := h.ep.Read(w.between(1, 400))
		var last bool
		if !h.app.Done {
			var answer []byte
			answer, last = hears(&h.app, p)
			h.ep.Write(answer)
		}
		if (last || h.ep.PeerClosed && h.ep.Readable() == 0) && !h.app.Done {
			h.app.Done = true
			h.ep.Write([]byte(tcptest.Bye))
			h.ep.CloseWrite()
		}
	}
	switch w.between(0, 5) {
	case 0, 1, 2:
		h.ep.Send(w.between(1, 200))
	case 3:
		if h.ep.AckDue {
			h.ep.Ack()
		}
	case 4:
		if h.ep.State == tcptest.SynReceived {
			h.ep.Handshake()
		} else {
			h.ep.Resend(w.between(1, 200))
		}
	case 5:
		h.ep.Probe()
	}
	w.speak(h)
}

// speakUp lets a client do something.
func (w *world) speakUp(c *client) {
	size := func() int { return w.between(1, 200) }
	switch what := w.between(0, 19); {
	case c.ep.State == tcptest.SynSent:
		if what < 4 {
			c.ep.Handshake()
		}
	case what < 10:
		if !c.ep.Closed && len(c.said) < 1500 {
			p := make([]byte, size())
			tcptest.Says(p, c.name, len(c.said))
			c.said = append(c.said, p...)
			c.ep.Write(p)
		}
		c.ep.Send(size())
	case what < 14:
		c.ep.Resend(size())
	case what < 16:
		c.ep.Ack()
	case what < 17:
		c.ep.Probe()
	case what < 18 && w.chance(3):
		c.ep.CloseWrite()
		c.ep.Send(size())
	case what < 19 && w.chance(12):
		c.gone = true
		c.ep.Abort()
	}
	w.listen(c)
}

func (w *world) stabilize(p stream.Position) {
	w.t.Logf("stable %d", p)
	w.stable = p
	if w.machine != nil {
		w.machine.Stable(w.now, p)
		w.carryOut()
	}
	if w.engine != nil {
		w.engine.Stable(w.now, p)
		w.carryOut()
	}
}

// checkpoint takes a generation; failing says that it never becomes one.
func (w *world) checkpoint(steps func(), failing bool) {
	g := &generation{at: w.now, unaccepted: map[stream.ConnID]bool{}}
	g.rec.Cut = w.machine.Freeze()
	w.frozen = true
	steps()
	var cuts []tcpwrap.Cut
	for _, t := range w.order {
		if h := w.host[t]; h.accepted && h.ep.State == tcptest.Established && !h.ep.Over() {
			g.socks = append(g.socks, &served{ep: h.ep.Image(), app: h.app})
			cuts = append(cuts, w.cut(h))
		}
	}
	adopted, from := w.machine.Adopt(cuts)
	if len(adopted) != len(cuts) {
		w.t.Fatalf("%d of %d connections adopted", len(adopted), len(cuts))
	}
	for i := range cuts {
		if adopted[i].Tuple != cuts[i].Tuple {
			w.t.Fatal("cuts in another order")
		}
		cuts[i].Conn = adopted[i].Conn
	}
	g.cuts = cuts
	from = min(from, g.rec.Cut)
	for _, m := range w.machine.Missing(adopted) {
		if h := w.host[m.Tuple]; h != nil && !h.accepted && h.ep.State != tcptest.Reset {
			g.unaccepted[m.Conn] = true
			from = min(from, m.Open)
		}
	}
	g.rec.From = max(from, 1)
	w.t.Logf("image %+v, cut %d, from %d, unaccepted %v", cuts, g.rec.Cut, g.rec.From, g.unaccepted)
	w.frozen = false
	w.carryOut()
	w.machine.Thaw(w.now)
	w.carryOut()
	g.nextConn = w.machine.NextConn()
	if failing {
		return
	}
	g.rec.ID = uint64(len(w.gens) + 1)
	g.pos = w.machine.Append(g.rec)
	w.gens = append(w.gens, g)
	w.carryOut()
}

// cut is where a connection stands, as the node reads it from an image.
func (w *world) cut(h *served) tcpwrap.Cut {
	c := h.ep.Cut()
	c.ClientTS = 0
	return c
}

// follow gives the ledger the log up to a position.
func (w *world) follow(to int) {
	for ; w.fed < to; w.fed++ {
		r := w.log[w.fed]
		w.ledger.Apply(w.now, stream.Entry{Pos: stream.Position(w.fed + 1), Rec: r})
		if g, yes := r.(stream.Generation); yes {
			tuples := map[stream.ConnID]stream.FourTuple{}
			for _, c := range w.gens[g.ID-1].cuts {
				tuples[c.Conn] = c.Tuple
			}
			w.ledger.Introduce(g, tuples)
		}
	}
}

func (w *world) String() string {
	s := ""
	for _, c := range w.clients {
		s += fmt.Sprintf("\nclient %d: state %d, said %d, acknowledged %d of %d, heard %d of %d; ", c.name, c.ep.State, len(c.said), c.ep.Una, c.ep.Nxt, len(c.heard), len(c.expects()))
		if h := w.host[tupleOf(c.name)]; h != nil {
			s += fmt.Sprintf("server state %d, received %d, read %d, acknowledged %d of %d", h.ep.State, h.ep.RcvNxt, h.app.Heard, h.ep.Una, h.ep.Nxt)
		}
	}
	return s
}
