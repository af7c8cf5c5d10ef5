package tcpwrap

import (
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// Limits bound what a Machine may remember on behalf of strangers.
type Limits struct {
	AheadPerConn int // octets kept out of order for one connection
	Ahead        int // the same over all connections
	Frozen       int // octets of packets kept while a dump runs
	Handshakes   int // SYNs of either side that wait for their SYN-ACK, and SYN-ACKs for their ACK
}

// DefaultLimits fit a receive buffer of 6 MiB, Linux's default maximum.
func DefaultLimits() Limits {
	return Limits{AheadPerConn: 8 << 20, Ahead: 256 << 20, Frozen: 256 << 20, Handshakes: 16384}
}

// Mode is what a Machine does with packets.
type Mode uint8

// Modes of a Machine.
const (
	Protecting Mode = iota // log and hold
	Stopped                // nothing passes any more: the server is gone or we are fenced
	Detached               // everything passes untouched: protection ended on purpose
)

// Machine is the failure-free half of the south side: it logs what clients
// send and holds what the server sends until all that it depends on is stable.
//
// It is a deterministic state machine without goroutine, clock or socket, and
// not safe for concurrent use. Events are its methods; what they want done is
// in Ready, to be carried out before the next event.
//
// The invariants, whatever the events:
//   - an outbound packet, of a connection of ours or not, is accepted only when
//     every Bytes, ClientFin, ConnOpen, ConnAccept, ConnDial, ConnAnswer and
//     ClientReset record made before it was caught is stable;
//   - an outbound acknowledgement never covers an octet that has no record;
//   - an inbound packet with new data is accepted only with its record.
type Machine struct {
	Ready Ready

	limits Limits
	mode   Mode
	now    time.Time // of the newest packet
	frozen bool

	next   stream.Position // the next record's
	dep    stream.Position // last record that output depends on
	proof  stream.Position // last record that is nothing but a proof of tenure
	stable stream.Position

	nextConn  stream.ConnID
	conns     map[stream.FourTuple]*conn
	blocked   map[stream.FourTuple]stream.Position // quarantined until a generation has them
	dirty     []*conn
	ahead     int
	congested bool
	doubt     bool // nothing is released

	syns     map[stream.FourTuple]*handshake
	synAge   []*handshake // oldest first, answered ones among them
	dials    map[stream.FourTuple]*dial
	dialAge  []*dial // as synAge
	embryos  int     // connections whose client has not answered the SYN-ACK
	embryAge []*conn // oldest first, others among them
	mutes    int     // connections that nothing passes of any more
	muteAge  []*conn // as embryAge

	late map[stream.FourTuple]lateConn // in TIME_WAIT where an old primary ended them

	held   []heldPacket
	waited []frozenPacket
	kept   int // octets in waited

	stats Stats
	holds holdTimes
}

// heldPacket is an outbound packet whose dependencies are not stable yet.
type heldPacket struct {
	id    PacketID
	until stream.Position
	since time.Time
	conn  *conn
	seg   released
}

// released is what is remembered of a segment for the moment it leaves.
type released struct {
	end           seqValue
	edge          seqValue // of the window, if it offers one
	tsval         uint32
	hasTS, offers bool
}

// frozenPacket is a packet caught while a dump runs.
type frozenPacket struct {
	id    PacketID
	seg   Segment
	dying bool
}

// NewMachine makes a machine whose first record will be at next. Records
// before it are stable.
func NewMachine(next stream.Position, firstConn stream.ConnID, limits Limits) *Machine {
	return &Machine{
		limits: limits, next: next, dep: next - 1, stable: next - 1,
		nextConn: max(firstConn, 1),
		conns:    map[stream.FourTuple]*conn{},
		syns:     map[stream.FourTuple]*handshake{},
		dials:    map[stream.FourTuple]*dial{},
		blocked:  map[stream.FourTuple]stream.Position{},
		late:     map[stream.FourTuple]lateConn{},
	}
}

// Packet is a caught packet. dying says that the server process is being torn
// down by its kernel; it need be known only for outbound FIN and RST.
func (m *Machine) Packet(now time.Time, id PacketID, s *Segment, dying bool) {
	m.now = now
	switch {
	case m.mode == Detached:
		m.Ready.Decide(id, Accept)
	case m.mode == Stopped:
		m.Ready.Decide(id, Drop)
	case m.frozen:
		m.freezePacket(id, s, dying)
	case s.Dir == Inbound && m.lingers(now, id, s):
	case s.Dir == Inbound:
		m.inbound(id, s)
	default:
		m.outbound(now, id, s, dying)
	}
}

// Append puts a record of the caller's own into the log's order.
func (m *Machine) Append(r stream.Record) stream.Position {
	p := m.next
	m.next++
	if _, yes := r.(stream.Generation); yes {
		for t, at := range m.blocked {
			if at == inImage {
				m.blocked[t] = p
			}
		}
	}
	m.Ready.Records = append(m.Ready.Records, Numbered{p, r})
	return p
}

// Depend appends a record that output caught from now on depends on: what a
// client has said to a server that others hear.
func (m *Machine) Depend(r stream.Record) stream.Position {
	m.dep = m.Append(r)
	return m.dep
}

// StableSoFar tells a new machine that of the records before its own only those
// up to p are stable.
func (m *Machine) StableSoFar(p stream.Position) { m.stable = min(m.stable, p) }

// Stable is the log's notice that everything up to p is stable.
func (m *Machine) Stable(now time.Time, p stream.Position) {
	p = min(p, m.next-1) // what has not been made is not stable, whoever says so
	if p <= m.stable {
		return
	}
	m.stable = p
	m.unblock()
	m.releaseStable(now)
}

func (m *Machine) releaseStable(now time.Time) {
	if m.mode != Protecting || m.doubt {
		return
	}
	n := 0
	for n < len(m.held) && m.held[n].until <= m.stable {
		h := &m.held[n]
		m.release(h)
		m.holds.add(now.Sub(h.since))
		n++
	}
	m.held = slices.Delete(m.held, 0, n)
}

func (m *Machine) release(h *heldPacket) {
	if h.conn != nil {
		m.noteReleased(h.conn, h.seg)
	}
	m.Ready.Decide(h.id, Accept)
}

// Tick makes the records that can wait: where each connection stands.
// Call it every few milliseconds.
func (m *Machine) Tick() {
	if m.mode != Protecting || m.frozen {
		return
	}
	for _, c := range m.dirty {
		c.dirty = false
		if m.conns[c.tuple] == c && !c.muted {
			m.tell(c)
			m.Append(c.state())
		}
	}
	clear(m.dirty)
	m.dirty = m.dirty[:0]
}

// Congested tells the machine whether the log lags so far behind that clients
// must slow down. New client data is then dropped before TCP sees it: it is
// neither logged nor acknowledged, and TCP's own congestion control does the
// rest.
func (m *Machine) Congested(yes bool) { m.congested = yes }

// Doubt tells the machine whether this node may have been replaced without
// knowing it yet: the log does not answer, or its link is down. In doubt nothing
// is released, not even what depends on nothing new: it is right, and could
// still reach a client that another node serves (promise 3).
func (m *Machine) Doubt(now time.Time, yes bool) {
	m.doubt = yes
	m.releaseStable(now)
}

// Stop makes nothing pass any more, in either direction: the server is gone,
// or this node is fenced. What was held is dropped.
func (m *Machine) Stop() { m.end(Stopped, Drop) }

// Detach lets everything pass from now on and releases what is held: protection
// ends, the server and its connections go on.
func (m *Machine) Detach() { m.end(Detached, Accept) }

func (m *Machine) end(mode Mode, v Verdict) {
	if m.mode == Stopped {
		return // nothing revives a stopped machine
	}
	m.mode = mode
	for i := range m.held {
		m.Ready.Decide(m.held[i].id, v)
	}
	for i := range m.waited {
		m.Ready.Decide(m.waited[i].id, v)
	}
	m.held, m.waited, m.kept, m.frozen = nil, nil, 0, false
}

// Mode is what the machine does with packets now.
func (m *Machine) Mode() Mode { return m.mode }

// Next is the position the next record gets.
func (m *Machine) Next() stream.Position { return m.next }

// NextConn is the identity the next connection gets.
func (m *Machine) NextConn() stream.ConnID { return m.nextConn }

func (m *Machine) inbound(id PacketID, s *Segment) {
	v := Accept
	c := m.conns[s.Tuple]
	switch {
	case s.Flags.Has(SYN | ACK):
		if !m.answered(s) {
			v = Drop
		}
	case s.Flags.Has(SYN):
		// A connection is two records, and a flood many. A SYN with data (RFC 7413) is
		// sent again without: what TCP accepts with it is in no record.
		if m.congested || len(s.Payload) > 0 {
			m.stats.Refused++
			v = Drop
			break
		}
		m.noteSYN(c, s)
	case c == nil:
		if s.Flags.Has(RST) {
			m.refused(s)
		}
		if _, yes := m.blocked[s.Tuple]; yes && !s.Flags.Has(RST) {
			v = Drop // what the server would make of it could show on other connections
		}
	case c.muted:
		if !s.Flags.Has(RST) {
			v = Drop
		}
	case c.expired && c.news(s):
		m.revive(c)
		v = Drop
	case s.Flags.Has(RST):
		if c.resets(s.Seq) {
			m.Depend(stream.ClientReset{Conn: c.id, Seq: s.Seq})
			if s.Seq == c.in.nxt {
				m.forget(c)
			} else {
				m.mute(c)
			}
		}
	case c.overtaken(s):
		if m.take(c, s) {
			m.noteAck(c, s)
			m.lowered(c, s)
		}
		v = Drop
	case c.discards(s):
	default:
		m.noteAck(c, s)
		if !m.take(c, s) {
			m.stats.Refused++
			v = Drop
			break
		}
		if c.closed() {
			m.Append(stream.ConnEnd{Conn: c.id, Reason: c.closing()})
			m.forget(c)
		}
	}
	m.Ready.Decide(id, v)
}

// lowered gives TCP a segment that acknowledges octets which the restored
// server has not sent again yet, with the acknowledgement lowered to what it has
// sent: TCP discards such a segment whole (RFC 9293, 3.10.7.4), and a client that
// waits for a download sends no other.
func (m *Machine) lowered(c *conn, s *Segment) {
	edge := s.Ack.Add(seqSize(s.Window) << c.sndWScale)
	m.Ready.Send(Outgoing{
		Up: true, Tuple: c.tuple, Seq: s.Seq, Ack: c.sentNxt, Flags: s.Flags, Urgent: s.Urgent,
		Window: uint16(min(65535, uint32(c.sentNxt.To(edge))>>c.sndWScale)),
		HasTS:  s.Options.HasTS, TSVal: s.Options.TSVal, TSEcr: s.Options.TSEcr, Payload: s.Payload,
	})
}

// tell logs what the server has said since the last time, as a digest. It goes
// ahead of what the client says next, so that a replay is compared with all but
// the last answers of a server that died. What a peer says to a server that
// dialled it is an answer: the log says to what, so that a replay does not give
// the answer before the question.
func (m *Machine) tell(c *conn) {
	if c.out.fresh() {
		m.Append(c.digest())
	}
	if c.dialled && c.told != c.clientAck {
		c.told = c.clientAck
		m.Append(c.state())
	}
}

// take logs what is new and in order. It answers false when the segment may not
// go on: it is ahead of its turn and there is no room to keep it, or it is news
// and the log lags behind.
func (m *Machine) take(c *conn, s *Segment) bool {
	fin := s.Flags.Has(FIN)
	if len(s.Payload) == 0 && !fin || s.End().LessEq(c.in.nxt) {
		return true
	}
	if m.congested {
		return false
	}
	m.urgent(c, s)
	c.last = m.now
	before := c.in.kept()
	budget := min(m.limits.AheadPerConn-before, m.limits.Ahead-m.ahead)
	ok := c.in.offer(s.Seq, s.Payload, fin, budget,
		func(seq seqValue, data []byte) {
			for len(data) > 0 { // a super-segment and what it made complete may exceed a record
				m.tell(c)
				n := min(len(data), stream.MaxPayload)
				p := m.Depend(stream.Bytes{Conn: c.id, Seq: seq, Payload: data[:n]})
				seq = seq.Add(seqSize(n))
				data = data[n:]
				c.noteLogged(seq, p)
				m.stats.LoggedBytes += uint64(n)
			}
		},
		func(seq seqValue) {
			if c.dialled { // a FIN is an answer as well
				m.tell(c)
			}
			p := m.Depend(stream.ClientFin{Conn: c.id, Seq: seq})
			c.noteLogged(seq.Add(1), p)
		})
	m.ahead += c.in.kept() - before
	return ok
}

// urgent logs a new urgent pointer, ahead of the octets that it is about: a
// server that does not take urgent data in line is given one octet less by it.
func (m *Machine) urgent(c *conn, s *Segment) {
	up, yes := s.Up()
	pending := c.clientUrgent && c.in.nxt.Less(c.clientUp)
	if !yes || c.in.fin || up.LessEq(c.in.nxt) || pending && up.LessEq(c.clientUp) {
		return // TCP does not look at it either (tcp_check_urg)
	}
	c.clientUp, c.clientUrgent = up, true
	c.noteLogged(up, m.Depend(stream.Urgent{Conn: c.id, Up: up}))
}

func (m *Machine) outbound(now time.Time, id PacketID, s *Segment, dying bool) {
	if dying && s.Flags&(FIN|RST) != 0 {
		m.stats.DyingDropped++ // the kernel closes for a process that died: clients must not hear of it
		m.Ready.Decide(id, Drop)
		return
	}
	c := m.conns[s.Tuple]
	if s.Flags.Has(SYN | ACK) {
		if c = m.established(c, s); c == nil { // no connection may begin that the log does not have
			m.Ready.Decide(id, Drop)
			return
		}
	} else if s.Flags.Has(SYN) {
		m.dialled(c, s)
		c = nil
	}
	if c != nil && c.muted {
		if s.Flags.Has(RST) {
			m.forget(c)
		}
		m.Ready.Decide(id, Drop)
		return
	}
	if c != nil && c.expired && s.Len() > 0 {
		m.revive(c)
		c = nil // and so its packet is dropped below
	}
	if c != nil && s.Flags.Has(ACK) && c.in.nxt.Less(s.Ack) {
		m.quarantine(c, id)
		return
	}
	next := m.next
	if c != nil {
		m.caught(c, s)
	}
	if _, yes := m.blocked[s.Tuple]; yes {
		m.Ready.Decide(id, Drop)
		return
	}
	if s.Flags&(FIN|RST) != 0 {
		m.prove(next)
	}
	// A packet of no connection of ours is held as well: it may acknowledge what
	// one that has ended sent last, and it may depend on all the others.
	h := heldPacket{id, m.dep, now, c, released{end: s.End(), hasTS: s.Options.HasTS, tsval: s.Options.TSVal}}
	if c != nil && s.Flags.Has(ACK) {
		h.seg.edge, h.seg.offers = c.offer(s), true
	}
	if m.dep <= m.stable && len(m.held) == 0 && !m.doubt {
		m.stats.Passed++
		m.release(&h)
		return
	}
	m.stats.Held++
	m.held = append(m.held, h)
}

// caught takes what a segment of the server's says about its connection.
func (m *Machine) caught(c *conn, s *Segment) {
	if c.embryonic && s.Flags.Has(RST) && s.Seq != c.serverISN.Add(1) {
		return // a stray acknowledgement is refused; the handshake stands (RFC 9293, 3.10.7.4)
	}
	c.noteCaught(s)
	if s.Len() > 0 {
		c.last = m.now
	}
	if s.Flags.Has(RST) || c.closed() {
		m.tell(c)
	}
	switch {
	case s.Flags.Has(RST):
		m.Depend(stream.ConnEnd{Conn: c.id, Reason: stream.EndReset})
		m.forget(c)
	case c.closed():
		m.Append(stream.ConnEnd{Conn: c.id, Reason: c.closing()})
		m.forget(c)
	}
}

// prove makes what ends a connection wait for a record of its own: octets of a
// primary that was replaced and does not know it are those that its successor
// says, but its FIN or RST may be for what only a stranger in its place would end.
// since is the next position as it was when the packet was caught.
func (m *Machine) prove(since stream.Position) {
	n := len(m.Ready.Records)
	if m.dep >= since || n > 0 && m.proof == m.Ready.Records[n-1].Pos {
		return
	}
	m.proof = m.Depend(stream.ConnEnd{Reason: stream.EndClosed})
}

// quarantine takes a connection out of protection whose TCP acknowledged
// octets that the log does not have. Nothing of it leaves until a generation
// holds those octets (promise 1 before availability).
func (m *Machine) quarantine(c *conn, id PacketID) {
	m.stats.Violations++
	m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndQuarantine})
	m.forget(c)
	m.blocked[c.tuple] = notInImage
	m.Ready.Decide(id, Drop)
}

func (m *Machine) newID() stream.ConnID {
	id := m.nextConn
	m.nextConn++
	return id
}

func (m *Machine) forget(c *conn) {
	m.clear(c)
	delete(m.conns, c.tuple)
	if c.muted {
		c.muted = false
		m.mutes--
	}
}

func (m *Machine) clear(c *conn) {
	m.grown(c)
	m.ahead -= c.in.kept()
	c.in.ahead, c.in.pending = nil, 0
}

// mute is the end of a connection by a RST that the server's TCP may or may not
// have taken: it is not at the octet up to which the log goes, so what TCP
// expects is not known for certain. If it was not taken, what the client sent
// before and comes late would be taken without a record; so nothing passes any
// more in either direction but another RST.
func (m *Machine) mute(c *conn) {
	m.clear(c)
	muted := func(c *conn) bool { return c.muted }
	for m.mutes >= max(m.limits.Handshakes, 1) {
		var oldest *conn
		oldest, m.muteAge = first(m.muteAge, muted)
		m.forget(oldest)
		m.blocked[oldest.tuple] = notInImage
	}
	c.muted = true
	m.mutes++
	m.muteAge = enqueue(m.muteAge, c, m.limits.Handshakes, muted)
}

func (m *Machine) noteAck(c *conn, s *Segment) {
	if c.clientAck.Less(s.Ack) {
		m.grown(c)
	}
	was := c.dirty
	c.noteAck(s)
	m.mark(c, was)
}

func (m *Machine) noteReleased(c *conn, r released) {
	was := c.dirty
	c.noteReleased(r)
	m.mark(c, was)
}

func (m *Machine) mark(c *conn, was bool) {
	if c.dirty && !was {
		m.dirty = append(m.dirty, c)
	}
}
