package tcpwrap_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// pair is one connection: a client's end, and the server's once it has answered.
type pair struct {
	name   int
	client *tcptest.Endpoint
	server *tcptest.Endpoint
	spoke  int // octets the client was given to send
	asked  int // SYN-ACKs that went unanswered in the end

	bypassed bool // something went round the machine
	base     seqnum.Value
	logged   []mark // records that hold its stream
	imaged   []mark // generations that do, up to end
}

// synAckTries is Linux's tcp_synack_retries: then the listener forgets the SYN.
const synAckTries = 5

// mark says that the record at pos holds a client's stream from start to end.
type mark struct {
	pos        stream.Position
	start, end seqnum.Value
}

// stableEdge is how far the stream is held by what is stable.
func (p *pair) stableEdge(stable stream.Position) seqnum.Value {
	edge := p.base
	for _, k := range p.imaged {
		if k.pos <= stable {
			edge = seqnum.Max(edge, k.end)
		}
	}
	for _, k := range p.logged {
		if k.pos <= stable && k.start.LessEq(edge) {
			edge = seqnum.Max(edge, k.end)
		}
	}
	return edge
}

// caught is a packet that waits for its verdict.
type caught struct {
	seg  tcpwrap.Segment
	pair *pair
	dep  stream.Position // newest record that output depends on, when it was caught
	next stream.Position // first record made after it was caught
}

// image is a checkpoint: where its connections stand and where the log that a
// recovery needs begins.
type image struct {
	cuts []tcpwrap.Cut
	from stream.Position
}

// network is a machine between the ends of some connections, a log that is
// stable late, and a network that loses, doubles and reorders.
type network struct {
	t        *rapid.T
	m        *tcpwrap.Machine
	now      time.Time
	pairs    []*pair
	byID     map[stream.ConnID]*pair
	next     map[stream.ConnID]seqnum.Value // where the next record of it begins
	id       tcpwrap.PacketID
	lastOut  tcpwrap.PacketID // the last outbound packet that was let go
	lastIn   tcpwrap.PacketID
	waits    map[tcpwrap.PacketID]*caught
	log      []stream.Record
	dep      stream.Position
	stable   stream.Position
	toServer []tcpwrap.Segment
	toClient []tcpwrap.Segment
	images   []image
	frozen   bool
	ended    bool
}

// said is octet i of what a client says.
func said(name, i int) byte { return byte(i*7) ^ byte(i>>8)*31 ^ byte(name*41) }

func (n *network) chance(in int, label string) bool {
	return rapid.IntRange(1, in).Draw(n.t, label) == 1
}

func (n *network) clock() uint32 { return uint32(n.now.UnixMilli()) }

func (n *network) config(name int, server bool) tcptest.Config {
	return tcptest.Config{
		Tuple: tupleOf(string(rune('A' + name))), Server: server,
		ISN:    seqnum.Value(rapid.OneOf(rapid.Uint32(), rapid.Uint32Range(1<<32-300, 1<<32-1)).Draw(n.t, "isn")),
		Buffer: rapid.IntRange(50, 600).Draw(n.t, "buffer"), Scale: uint8(rapid.IntRange(0, 3).Draw(n.t, "scale")),
		MSS: 100, TS: rapid.Bool().Draw(n.t, "timestamps"), Strict: rapid.Bool().Draw(n.t, "strict"),
		Clock: n.clock, Overrun: func() bool { return n.chance(8, "overrun") },
	}
}

// pairOf is the connection that a segment belongs to: of those with its
// addresses the newest whose server's end has this sequence, in short the last.
func (n *network) pairOf(t stream.FourTuple) *pair {
	for i := len(n.pairs) - 1; i >= 0; i-- {
		if n.pairs[i].client.Tuple == t {
			return n.pairs[i]
		}
	}
	n.t.Fatalf("nobody has the addresses %s", t)
	return nil
}

func (n *network) catch(s tcpwrap.Segment) {
	n.id++
	n.t.Logf("catch %d: dir %d %s seq %d ack %d flags %#x, %d octets", n.id, s.Dir, s.Tuple.Client, s.Seq, s.Ack, s.Flags, len(s.Payload))
	p := n.pairOf(s.Tuple)
	n.waits[n.id] = &caught{seg: s, pair: p, dep: n.dep, next: stream.Position(len(n.log)) + 1}
	own := s // the packet's memory is gone after the event
	own.Payload = bytes.Clone(s.Payload)
	n.m.Packet(n.now, n.id, &own, false)
	n.carryOut()
	for i := range own.Payload {
		own.Payload[i] = 0xee
	}
}

// carryOut does what the machine wants done and checks that it may want it.
func (n *network) carryOut() {
	if err := n.m.Check(); err != nil {
		n.t.Fatal(err)
	}
	records := n.m.Ready.Records
	verdicts := append([]tcpwrap.Decision(nil), n.m.Ready.Verdicts...)
	for i := range n.m.Ready.Segments {
		if !n.m.Ready.Segments[i].Up {
			n.t.Fatal("a machine spoke to a client by itself")
		}
	}
	for _, r := range records {
		n.record(r)
	}
	n.m.Ready.Reset()
	for _, v := range verdicts {
		c := n.waits[v.ID]
		if c == nil {
			n.t.Fatalf("packet %d got a verdict and was not waiting", v.ID)
		}
		delete(n.waits, v.ID)
		n.verdict(v, c)
	}
}

func (n *network) record(r tcpwrap.Numbered) {
	n.t.Logf("record %d: %T%v", r.Pos, r.Record, r.Record)
	if want := stream.Position(len(n.log) + 1); r.Pos != want {
		n.t.Fatalf("record at %d, want %d", r.Pos, want)
	}
	rec := r.Record
	grown := func(id stream.ConnID, seq seqnum.Value, payload []byte, end seqnum.Value) {
		p := n.byID[id]
		if p == nil {
			n.t.Fatalf("a record of connection %d, which was never opened", id)
			return
		}
		if seq != n.next[id] {
			n.t.Fatalf("connection %d: record of %d, expected %d", id, seq, n.next[id])
		}
		n.next[id] = end
		at := int(p.client.ISN.Add(1).To(seq))
		for i, b := range payload {
			if b != said(p.name, at+i) {
				n.t.Fatalf("connection %d: octet %d is wrong in the log", id, at+i)
			}
		}
		p.logged = append(p.logged, mark{r.Pos, seq, end})
	}
	switch x := rec.(type) {
	case stream.ConnOpen:
		p := n.pairOf(x.Tuple)
		if p.client.ISN != x.ISN {
			n.t.Fatalf("connection %d opened at %d, its SYN was %d", x.Conn, x.ISN, p.client.ISN)
		}
		n.byID[x.Conn], n.next[x.Conn] = p, x.ISN.Add(1)
		n.dep = r.Pos
	case stream.ConnAccept, stream.ClientReset:
		n.dep = r.Pos
	case stream.Bytes:
		x.Payload = bytes.Clone(x.Payload)
		if len(x.Payload) == 0 {
			n.t.Fatal("a record of nothing")
		}
		grown(x.Conn, x.Seq, x.Payload, x.Seq.Add(seqnum.Size(len(x.Payload))))
		rec, n.dep = x, r.Pos
	case stream.ClientFin:
		p := n.byID[x.Conn]
		if p != nil && !p.client.Closed {
			n.t.Fatalf("connection %d: a FIN that the client did not send", x.Conn)
		}
		grown(x.Conn, x.Seq, nil, x.Seq.Add(1))
		n.dep = r.Pos
	}
	n.log = append(n.log, rec)
}

func (n *network) verdict(v tcpwrap.Decision, c *caught) {
	n.t.Logf("verdict %d: %d", v.ID, v.Verdict)
	if v.Verdict == tcpwrap.Drop {
		return
	}
	if c.seg.Dir == tcpwrap.Inbound {
		if v.ID < n.lastIn {
			n.t.Fatalf("inbound packet %d overtook %d", n.lastIn, v.ID)
		}
		n.lastIn = v.ID
		n.up(c.pair, &c.seg)
		return
	}
	if v.ID < n.lastOut {
		n.t.Fatalf("outbound packet %d overtook %d", n.lastOut, v.ID)
	}
	n.lastOut = v.ID
	if !n.ended {
		if c.dep > n.stable {
			n.t.Fatalf("packet %d left at %d and depends on %d", v.ID, n.stable, c.dep)
		}
		if c.seg.Flags&(tcpwrap.FIN|tcpwrap.RST) != 0 && n.stable < c.next {
			n.t.Fatalf("packet %d ends a connection at %d; no record made since is stable", v.ID, n.stable)
		}
		edge := c.pair.stableEdge(n.stable)
		if c.seg.Flags.Has(tcpwrap.ACK) && c.pair.client.State != tcptest.Reset && edge.Less(c.seg.Ack) {
			n.t.Fatalf("packet %d left and acknowledges %d; stable is %d", v.ID, c.seg.Ack, edge)
		}
	}
	n.toClient = append(n.toClient, c.seg)
}

// up gives the server's host a segment.
func (n *network) up(p *pair, s *tcpwrap.Segment) {
	switch {
	case s.Flags.Has(tcpwrap.SYN) && (p.server == nil || p.server.State == tcptest.Reset) && s.Seq == p.client.ISN:
		p.server = tcptest.Answer(n.config(p.name, true), s)
	case p.server == nil:
		if r, ok := tcptest.Refusal(s); ok {
			n.catch(r)
		}
		return
	default:
		p.server.Receive(s)
	}
	n.speak(p)
}

// speak catches what the server's end wants to say.
func (n *network) speak(p *pair) {
	out := p.server.Out
	p.server.Out = nil
	for _, s := range out {
		n.catch(s)
	}
}

// listen puts what a client's end wants to say on the wire.
func (n *network) listen(p *pair) {
	n.toServer = append(n.toServer, p.client.Out...)
	p.client.Out = nil
}

// deliver takes a packet out of the wire, at random.
func (n *network) deliver(wire *[]tcpwrap.Segment, to func(s *tcpwrap.Segment)) {
	if len(*wire) == 0 {
		return
	}
	i := 0
	if !n.chance(2, "in order") {
		i = rapid.IntRange(0, len(*wire)-1).Draw(n.t, "packet")
	}
	s := (*wire)[i]
	if !n.chance(8, "doubled") {
		*wire = append((*wire)[:i:i], (*wire)[i+1:]...)
	}
	if !n.chance(6, "lost") {
		to(&s)
	}
}

func (n *network) toServerNow(s *tcpwrap.Segment) { n.catch(*s) }

func (n *network) toClientNow(s *tcpwrap.Segment) {
	p := n.pairOf(s.Tuple)
	p.client.Receive(s)
	n.listen(p)
}

// dial begins a connection; only the newest one of an address pair is looked at.
func (n *network) dial() *pair {
	name := len(n.pairs)
	p := &pair{name: name, client: tcptest.Dial(n.config(name, false))}
	p.base = p.client.ISN.Add(1)
	n.pairs = append(n.pairs, p)
	n.listen(p)
	return p
}

// connected is a connection that was there before protection began.
func (n *network) connected() *pair {
	p := n.dial()
	for i := 0; i < len(n.toServer); i++ {
		s := n.toServer[i]
		if p.server == nil {
			p.server = tcptest.Answer(n.config(p.name, true), &s)
		} else {
			p.server.Receive(&s)
		}
		for _, o := range p.server.Out {
			p.client.Receive(&o)
		}
		p.server.Out = nil
		n.listen(p)
	}
	n.toServer = nil
	if p.server.State != tcptest.Established {
		n.t.Fatal("the model cannot shake hands")
	}
	return p
}

// dump ends a freeze: where each connection stands goes to the machine.
func (n *network) dump() {
	var im image
	var cuts []tcpwrap.Cut
	taken := map[*pair]seqnum.Value{}
	for _, p := range n.pairs {
		if p.server != nil {
			taken[p] = p.server.RcvNxt
		}
		if p.server != nil && p.server.State == tcptest.Established && !p.server.Over() {
			cuts = append(cuts, p.server.Cut())
		}
	}
	im.cuts, im.from = n.m.Adopt(cuts)
	if len(im.cuts) != len(cuts) {
		n.t.Fatalf("%d of %d connections adopted", len(im.cuts), len(cuts))
	}
	for _, c := range im.cuts {
		p := n.pairOf(c.Tuple)
		if n.byID[c.Conn] == nil { // it begins here
			n.byID[c.Conn], n.next[c.Conn] = p, c.RcvNxt
			if len(n.images) == 0 {
				p.base = c.RcvNxt
			}
		}
	}
	n.t.Logf("image %+v from %d", im.cuts, im.from)
	n.carryOut()
	n.m.Thaw(n.now)
	n.carryOut()
	n.frozen = false
	n.images = append(n.images, im)
	if n.chance(4, "upload fails") && len(n.images) > 1 {
		return
	}
	pos := n.m.Append(stream.Generation{ID: uint64(len(n.images) + 1)})
	for _, p := range n.pairs {
		if end, yes := taken[p]; yes { // the server has it, if its socket is gone
			p.imaged = append(p.imaged, mark{pos: pos, end: end})
		}
	}
	n.carryOut()
}

// step lets one thing happen.
func (n *network) step(bypasses bool) {
	n.now = n.now.Add(time.Millisecond)
	p := n.pairs[rapid.IntRange(0, len(n.pairs)-1).Draw(n.t, "who")]
	size := func() int { return rapid.IntRange(1, 150).Draw(n.t, "size") }
	switch what := rapid.IntRange(0, 99).Draw(n.t, "what"); {
	case what < 18:
		k := size()
		b := make([]byte, k)
		for i := range b {
			b[i] = said(p.name, p.spoke+i)
		}
		if !p.client.Closed && p.spoke < 3000 {
			p.client.Write(b)
			p.spoke += k
		}
		p.client.Send(size())
	case what < 22:
		p.client.Resend(size())
	case what < 24:
		if p.client.State == tcptest.SynSent {
			p.client.Handshake()
		} else {
			p.client.Repeat(p.client.Nxt.Sub(seqnum.Size(size())), size())
		}
	case what < 26:
		p.client.Ack()
	case what < 27:
		p.client.Probe()
	case what < 28:
		p.client.CloseWrite()
		p.client.Send(size())
	case what < 29 && n.chance(5, "abort"):
		p.client.Abort()
	case what < 45:
		n.deliver(&n.toServer, n.toServerNow)
	case what < 58:
		n.deliver(&n.toClient, n.toClientNow)
	case what < 75:
		n.serve(p, size)
	case what < 86:
		n.stabilize(stream.Position(rapid.IntRange(int(n.stable), len(n.log)).Draw(n.t, "stable")))
	case what < 88:
		n.m.Tick()
		n.carryOut()
	case what < 90:
		n.m.Congested(n.chance(3, "congested"))
	case what < 92:
		if !n.frozen {
			if at := n.m.Freeze(); at != stream.Position(len(n.log)) {
				n.t.Fatalf("image at %d, %d records", at, len(n.log))
			}
			n.frozen = true
		}
	case what < 95:
		if n.frozen {
			n.dump()
		}
	case what < 97:
		if len(n.pairs) < 5 {
			n.dial()
		}
	case bypasses && p.server != nil && !n.frozen:
		if p.client.Send(size()) {
			s := p.client.Out[len(p.client.Out)-1]
			p.bypassed = true
			p.server.Receive(&s)
			n.speak(p)
		}
	}
	n.listen(p)
}

// serve lets the server's end do one thing; while it is frozen it does nothing.
func (n *network) serve(p *pair, size func() int) {
	s := p.server
	if s == nil || n.frozen {
		return
	}
	switch rapid.IntRange(0, 7).Draw(n.t, "server") {
	case 0, 1:
		s.Read(size())
	case 2, 3:
		if !s.Closed {
			s.Write(make([]byte, size()))
		}
		s.Send(size())
	case 4:
		s.Resend(size())
	case 5:
		s.Ack()
	case 6:
		if n.chance(4, "close") {
			s.CloseWrite()
			s.Send(size())
		}
	case 7:
		switch {
		case s.State == tcptest.SynReceived:
			s.Handshake()
		case n.chance(12, "reset"):
			s.Abort()
		default:
			s.Probe()
		}
	}
	n.speak(p)
}

func (n *network) stabilize(to stream.Position) {
	n.t.Logf("stable %d", to)
	n.stable = to
	n.m.Stable(n.now, to)
	n.carryOut()
}

// finish lets everything come to an end: nothing may be left behind.
func (n *network) finish() {
	if n.frozen {
		n.dump()
	}
	n.m.Congested(false)
	for round := 0; ; round++ {
		n.now = n.now.Add(time.Second)
		n.stabilize(stream.Position(len(n.log)))
		if len(n.waits) > 0 {
			n.t.Fatalf("%d packets still wait and all is stable", len(n.waits))
		}
		busy := n.m.WantGeneration()
		if busy {
			n.m.Freeze()
			n.dump()
		}
		for _, p := range n.pairs {
			if p.client.State == tcptest.Reset || p.server != nil && p.server.State == tcptest.Reset {
				continue
			}
			if p.client.State == tcptest.SynSent || p.server == nil || p.server.State != tcptest.Established || !p.client.Idle() {
				busy = true
			}
			if p.client.State == tcptest.SynSent {
				p.client.Handshake()
			} else if !p.client.Resend(100) {
				p.client.Probe()
			}
			p.client.Send(100)
			n.listen(p)
			if p.server != nil {
				p.server.Overrun = nil
				if p.server.State == tcptest.SynReceived { // a SYN-ACK is sent again until it is answered
					if p.asked++; p.asked > synAckTries {
						p.server = nil
						continue
					}
					p.server.Handshake()
				}
				p.server.Read(1 << 20)
				p.client.Read(1 << 20)
				p.server.Resend(100)
				p.server.Send(100)
				p.server.Ack()
				n.speak(p)
			}
		}
		if !busy {
			return
		}
		if round > 3000 {
			n.t.Fatalf("no end in sight: %s", n)
		}
		for len(n.toServer) > 0 {
			s := n.toServer[0]
			n.toServer = n.toServer[1:]
			n.toServerNow(&s)
		}
		n.stabilize(stream.Position(len(n.log)))
		for len(n.toClient) > 0 {
			s := n.toClient[0]
			n.toClient = n.toClient[1:]
			n.toClientNow(&s)
		}
	}
}

func (n *network) String() string {
	s := ""
	for _, p := range n.pairs {
		s += fmt.Sprintf("%d: client %+v, bypassed %v", p.name, p.client.State, p.bypassed)
		if p.server != nil {
			s += fmt.Sprintf(", server %v, sent %d of %d, received %d; ", p.server.State, p.client.Una, p.client.Nxt, p.server.RcvNxt)
		}
	}
	return s
}

// covered checks that the log from an image's From on has all that the image
// lacks.
func (n *network) covered(im image) {
	for _, c := range im.cuts {
		at, edge := c.RcvNxt, c.RcvNxt
		for i, r := range n.log {
			var id stream.ConnID
			var seq, end seqnum.Value
			switch r := r.(type) {
			case stream.Bytes:
				id, seq, end = r.Conn, r.Seq, r.Seq.Add(seqnum.Size(len(r.Payload)))
			case stream.ClientFin:
				id, seq, end = r.Conn, r.Seq, r.Seq.Add(1)
			}
			if id != c.Conn {
				continue
			}
			edge = seqnum.Max(edge, end)
			if stream.Position(i+1) >= im.from && at.Less(end) && seq.LessEq(at) {
				at = end
			}
		}
		if at != edge {
			n.t.Fatalf("connection %d: image at %d, the log from %d on leads to %d, all of it to %d", c.Conn, c.RcvNxt, im.from, at, edge)
		}
	}
}

func testMachine(t *rapid.T, bypasses bool) {
	limits := tcpwrap.DefaultLimits()
	limits.AheadPerConn = rapid.SampledFrom([]int{0, 2000, 1 << 20}).Draw(t, "ahead per connection")
	limits.Ahead = rapid.SampledFrom([]int{3000, 1 << 20}).Draw(t, "ahead")
	limits.Frozen = rapid.SampledFrom([]int{0, 3000, 1 << 20}).Draw(t, "frozen")
	n := &network{
		t: t, m: tcpwrap.NewMachine(1, 1, limits), now: time.Unix(1, 0),
		byID: map[stream.ConnID]*pair{}, next: map[stream.ConnID]seqnum.Value{}, waits: map[tcpwrap.PacketID]*caught{},
	}
	for range rapid.IntRange(1, 2).Draw(t, "connections") {
		n.connected()
	}
	n.m.Freeze()
	n.dump()
	for range rapid.IntRange(1, 30).Draw(t, "steps") * 20 {
		n.step(bypasses)
	}
	switch rapid.IntRange(0, 3).Draw(t, "end") {
	case 0:
		n.ended = true
		n.m.Stop()
		n.carryOut()
		for _, w := range n.waits {
			t.Fatalf("%+v waits for a machine that has stopped", w.seg)
		}
	case 1:
		n.ended = true
		n.m.Detach()
		n.carryOut()
		for _, w := range n.waits {
			t.Fatalf("%+v waits for a machine that lets everything pass", w.seg)
		}
	default:
		n.finish()
	}
	for _, im := range n.images {
		n.covered(im)
	}
}

// often checks a property more often than rapid does by itself.
func often(t *testing.T, prop func(t *rapid.T)) {
	for range 10 {
		rapid.Check(t, prop)
	}
}

// Whatever clients, network, server, log and dumps do, in whatever order: no
// acknowledgement and no output leaves before what it stands on is stable, the
// log is each client's stream, every packet gets one verdict, the log from an
// image on has what the image lacks, and in the end nothing is left behind.
func TestMachineKeepsItsPromises(t *testing.T) {
	often(t, func(t *rapid.T) { testMachine(t, false) })
}

// The same when data reaches the server's TCP round the machine, which must not
// happen and must not break a promise.
func TestMachineQuarantines(t *testing.T) {
	often(t, func(t *rapid.T) { testMachine(t, true) })
}
