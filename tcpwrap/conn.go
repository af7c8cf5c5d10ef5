package tcpwrap

import (
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// Cut is where a connection stands: in a checkpoint's image, or after a
// replay. It is what a machine needs in order to take a connection on.
type Cut struct {
	Conn   stream.ConnID // 0: the machine gives it one
	Tuple  stream.FourTuple
	RcvNxt seqnum.Value // next client octet the server's TCP expects
	SndUna seqnum.Value
	SndNxt seqnum.Value
	SndWnd seqnum.Size // what the client offers beyond SndUna, octets
	RcvWnd seqnum.Size // what is left of the window that the client was given, beyond RcvNxt
	// Shift counts of the windows (RFC 7323): Snd scales what the client
	// advertises, Rcv what the server does. HasTS: timestamps are on.
	SndWScale, RcvWScale uint8
	HasTS                bool
	ClientTS, ServerTS   uint32
	ClientFin            bool // the client's FIN is below RcvNxt
	ServerFin            bool // the server's FIN is below SndNxt
	// ServerUp is the newest urgent pointer of the server's that its client has not
	// acknowledged yet, when Urgent.
	ServerUp seqnum.Value
	Urgent   bool
	// Open is where the log has the connection's open record, when it was
	// re-created out of that: the server may not have accepted it yet. Else 0.
	Open stream.Position
	// Dialled: the server opened the connection, and the client is its peer.
	Dialled bool
}

// unacked is a run of logged octets that the server's TCP has not yet
// acknowledged: a checkpoint may find them missing from its image (TCP may drop
// what it cannot queue), so a recovery may still need their record.
type unacked struct {
	end seqnum.Value
	pos stream.Position
}

// conn is one protected connection.
type conn struct {
	id    stream.ConnID
	tuple stream.FourTuple

	in      assembly // instream: nxt is the log's edge
	unacked []unacked

	sndWScale, rcvWScale uint8
	hasTS                bool

	clientAck  seqnum.Value
	clientEdge seqnum.Value
	clientTS   uint32
	serverNxt  seqnum.Value // released, plus one
	serverTS   uint32
	serverEdge seqnum.Value // right edge of the window as released
	sentNxt    seqnum.Value // caught, plus one: what the server's TCP has sent
	rcvAck     seqnum.Value // what the server's TCP was last seen to acknowledge
	rcvEdge    seqnum.Value // right edge of what it has offered, when offered
	offered    bool

	serverFin   bool
	serverFinAt seqnum.Value
	serverFirst bool            // its FIN went before the client's came: TIME_WAIT is the server's
	finAcked    bool            // server's TCP acknowledged the client's FIN
	dirty       bool            // a ConnState is due
	carried     bool            // brought here by a takeover
	openPos     stream.Position // of its open record; 0: its handshake was not seen
	out         Digest          // of the outstream since the newest cut
	last        time.Time       // when either side said something new; zero: not known
	expired     bool            // idle for too long: not protected
	embryonic   bool            // the client has not answered the SYN-ACK
	muted       bool            // its client has reset it; TCP may not know

	dialled                    bool         // the server opened it
	told                       seqnum.Value // the newest clientAck that tell has logged
	clientUp, serverUp         seqnum.Value // newest urgent pointers
	clientUrgent, serverUrgent bool         // they mean something

	opened               bool // we saw the handshake
	clientISN, serverISN seqnum.Value
}

// maxUnacked bounds conn.unacked, against clients that send single octets.
const maxUnacked = 1024

// handshake is a SYN that has not been answered yet.
type handshake struct {
	tuple   stream.FourTuple
	isn     seqnum.Value
	window  uint16
	options [40]byte
	nopt    int
	wscale  int8
	hasTS   bool
	tsval   uint32
}

func newConn(id stream.ConnID, c Cut) *conn {
	n := &conn{
		id: id, tuple: c.Tuple,
		sndWScale: c.SndWScale, rcvWScale: c.RcvWScale, hasTS: c.HasTS,
		clientAck: c.SndUna, clientEdge: c.SndUna.Add(c.SndWnd), clientTS: c.ClientTS,
		serverNxt: c.SndNxt, serverTS: c.ServerTS, sentNxt: seqnum.Max(c.SndUna, c.SndNxt), rcvAck: c.RcvNxt,
		openPos: c.Open, dialled: c.Dialled, told: c.SndUna, serverEdge: c.RcvNxt.Add(c.RcvWnd),
	}
	n.serverUp, n.serverUrgent = c.ServerUp, c.Urgent
	n.in.nxt = c.RcvNxt
	n.in.fin = c.ClientFin
	n.finAcked = c.ClientFin
	if c.ServerFin {
		n.serverFin, n.serverFinAt = true, c.SndNxt.Sub(1)
		n.serverFirst = !c.ClientFin
	}
	return n
}

// here is where the connection stands.
func (c *conn) here() Cut {
	k := Cut{
		Conn: c.id, Tuple: c.tuple, RcvNxt: c.in.nxt, SndUna: c.clientAck, SndNxt: c.sentNxt,
		SndWScale: c.sndWScale, RcvWScale: c.rcvWScale, HasTS: c.hasTS, ClientTS: c.clientTS, ServerTS: c.serverTS,
		ClientFin: c.in.fin, ServerFin: c.serverFin, Open: c.openPos, Dialled: c.dialled,
	}
	if c.in.nxt.Less(c.serverEdge) {
		k.RcvWnd = c.in.nxt.To(c.serverEdge)
	}
	if c.clientAck.Less(c.clientEdge) {
		k.SndWnd = c.clientAck.To(c.clientEdge)
	}
	return k
}

// discards reports whether the server's TCP is sure to discard an inbound
// segment that is neither SYN nor RST, so that nothing in it may be believed or
// logged: one without an acknowledgement, one that acknowledges what was never
// sent (RFC 5961, 5.2) and one beyond the window, which a client's TCP does not
// send. A stranger who does not see the connection forges no better ones.
func (c *conn) discards(s *Segment) bool {
	return !s.Flags.Has(ACK) || c.sentNxt.Less(s.Ack) ||
		c.embryonic && s.Ack.LessEq(c.clientAck) || // not the answer to the SYN-ACK
		c.offered && c.rcvEdge.Less(s.Seq)
}

// overtaken reports whether an inbound segment acknowledges output of the old
// primary that the log did not know the client to have.
func (c *conn) overtaken(s *Segment) bool {
	return c.carried && s.Flags.Has(ACK) && c.sentNxt.Less(s.Ack)
}

// resets reports whether the server's TCP takes a RST for good: at exactly the
// octet it expects, or behind the last one it has (RFC 5961, 3.2 as Linux has
// it). It may expect less than we logged, when it had no room.
func (c *conn) resets(seq seqnum.Value) bool {
	n := len(c.in.ahead)
	return seq == c.in.nxt || seq == c.rcvAck || n > 0 && seq == c.in.ahead[n-1].end()
}

// noteAck takes what an inbound segment says about the outstream.
func (c *conn) noteAck(s *Segment) {
	edge := s.Ack.Add(seqnum.Size(s.Window) << c.sndWScale)
	if c.clientAck.Less(s.Ack) {
		c.clientAck, c.dirty = s.Ack, true
	}
	if c.serverUrgent && c.serverUp.LessEq(c.clientAck) {
		c.serverUrgent = false
	}
	if c.clientEdge.Less(edge) {
		c.clientEdge, c.dirty = edge, true
	}
	if c.hasTS && s.Options.HasTS && laterTS(c.clientTS, s.Options.TSVal) {
		c.clientTS, c.dirty = s.Options.TSVal, true
	}
}

// noteCaught takes what an outbound segment says when TCP hands it over, which
// is before it may leave.
func (c *conn) noteCaught(s *Segment) {
	if s.Flags.Has(ACK) {
		n := 0
		for n < len(c.unacked) && c.unacked[n].end.LessEq(s.Ack) {
			n++
		}
		c.unacked = slices.Delete(c.unacked, 0, n)
		if c.rcvAck.Less(s.Ack) {
			c.rcvAck = s.Ack
		}
		if e := c.offer(s); !c.offered || c.rcvEdge.Less(e) {
			c.rcvEdge, c.offered = e, true
		}
		if c.in.fin && s.Ack == c.in.nxt {
			c.finAcked = true
		}
	}
	if end := s.End(); c.sentNxt.Less(end) {
		c.sentNxt = end
	}
	c.noteUrgent(s)
	c.out.Write(s.Seq, s.Payload)
	if s.Flags.Has(FIN) && !c.serverFin {
		c.serverFin, c.serverFinAt = true, s.End().Sub(1)
		c.serverFirst = !c.finAcked
	}
}

// offer is the right edge of the window in a segment of the server's.
func (c *conn) offer(s *Segment) seqnum.Value {
	win := seqnum.Size(s.Window)
	if !s.Flags.Has(SYN) { // whose window is never scaled (RFC 7323, 2.2)
		win <<= c.rcvWScale
	}
	return s.Ack.Add(win)
}

// noteUrgent takes an urgent pointer of the server's.
func (c *conn) noteUrgent(s *Segment) {
	if up, urgent := s.Up(); urgent && (!c.serverUrgent || c.serverUp.Less(up)) {
		c.serverUp, c.serverUrgent = up, true
	}
}

// noteLogged remembers which record holds the octets up to end.
func (c *conn) noteLogged(end seqnum.Value, pos stream.Position) {
	if len(c.unacked) == maxUnacked { // in pairs, each for the older record: it is only ever too careful
		for i := range maxUnacked / 2 {
			c.unacked[i] = unacked{c.unacked[2*i+1].end, c.unacked[2*i].pos}
		}
		c.unacked = c.unacked[:maxUnacked/2]
	}
	c.unacked = append(c.unacked, unacked{end, pos})
}

// noteReleased takes what an outbound segment says once it may leave.
func (c *conn) noteReleased(r released) {
	if c.serverNxt.Less(r.end) {
		c.serverNxt, c.dirty = r.end, true
	}
	if r.hasTS && laterTS(c.serverTS, r.tsval) {
		c.serverTS, c.dirty = r.tsval, true
	}
	if r.offers && c.serverEdge.Less(r.edge) {
		c.serverEdge, c.dirty = r.edge, true
	}
}

// laterTS reports whether timestamp v comes after the known one (RFC 7323, 4.3:
// compared as sequence numbers are). 0 stands for none known.
func laterTS(known, v uint32) bool {
	return known == 0 || seqnum.Value(known).Less(seqnum.Value(v))
}

// closed reports whether both directions have ended and been acknowledged.
func (c *conn) closed() bool {
	return c.in.fin && c.finAcked && c.serverFin && c.serverFinAt.Less(c.clientAck)
}

// closing is the reason of a connection that is closed.
func (c *conn) closing() stream.EndReason {
	if c.serverFirst {
		return stream.EndTimeWait
	}
	return stream.EndClosed
}

func (c *conn) digest() stream.OutDigest {
	return stream.OutDigest{Conn: c.id, Base: c.out.Base(), Seq: c.out.Next(), Sum: c.out.Sum()}
}

func (c *conn) state() stream.ConnState {
	return stream.ConnState{
		Conn: c.id, ClientAck: c.clientAck, ClientEdge: c.clientEdge,
		ServerNxt: c.serverNxt, ClientTS: c.clientTS, ServerTS: c.serverTS, ServerEdge: c.serverEdge,
	}
}

// needs is the first record a recovery needs for this connection when its
// image ends at rcvNxt, or 0 when that is none.
func (c *conn) needs(rcvNxt seqnum.Value) stream.Position {
	for _, u := range c.unacked {
		if rcvNxt.Less(u.end) {
			return u.pos
		}
	}
	return 0
}
