package tcpwrap

import (
	"bytes"
	"math"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

type (
	seqValue = seqnum.Value
	seqSize  = seqnum.Size
)

// Freeze makes every packet wait, in both directions, from now until Thaw: a
// dump is going to cut through the connections, and what TCP took or sent in
// its midst would be in nobody's image (south.md, "SKIP without a hold loses
// data"). It answers the position the image will stand at. What was held
// before is still released as it becomes stable: it left TCP before the cut.
func (m *Machine) Freeze() stream.Position {
	m.frozen = m.mode == Protecting
	return m.next - 1
}

// Frozen reports whether packets wait for a dump.
func (m *Machine) Frozen() bool { return m.frozen }

func (m *Machine) freezePacket(id PacketID, s *Segment, dying bool) {
	n := len(s.Payload) + len(s.RawOptions) + fragmentCost
	if m.kept+n > m.limits.Frozen {
		m.stats.Refused++
		m.Ready.Decide(id, Drop) // TCP sends it again
		return
	}
	w := frozenPacket{id: id, seg: *s, dying: dying}
	w.seg.Payload = bytes.Clone(s.Payload)
	w.seg.RawOptions = bytes.Clone(s.RawOptions)
	m.kept += n
	m.waited = append(m.waited, w)
}

// Thaw ends a Freeze: the packets that waited are handled in the order they
// came.
func (m *Machine) Thaw(now time.Time) {
	if !m.frozen {
		return
	}
	m.frozen = false
	waited := m.waited
	m.waited, m.kept = nil, 0
	for i := range waited {
		w := &waited[i]
		m.Packet(now, w.id, &w.seg, w.dying)
	}
}

// Adopt takes on connections at the places given: those of a checkpoint's
// image (while frozen), or those a replay has brought up to date. A connection
// the machine knows keeps its identity and its log; an unknown one gets a new
// identity when the cut has none. The answer has each cut with its identity,
// without those that cannot be protected, and the first position a recovery
// from these cuts needs (the next record when it needs nothing older).
func (m *Machine) Adopt(cuts []Cut) (adopted []Cut, from stream.Position) {
	from = m.next
	for i := range m.waited { // sent by the TCP that is in the image
		if s := &m.waited[i].seg; s.Dir == Outbound && s.Flags.Has(URG) && m.conns[s.Tuple] != nil {
			m.conns[s.Tuple].noteUrgent(s)
		}
	}
	for _, k := range cuts {
		delete(m.late, k.Tuple)
		c := m.conns[k.Tuple]
		if c != nil && c.in.nxt.Less(k.RcvNxt) {
			// The image is ahead of the log: a bug, or a packet that went round
			// us. The image has the octets, so the connection begins anew.
			m.stats.Violations++
			m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndQuarantine})
			m.forget(c)
			m.blocked[k.Tuple] = notInImage
			c = nil
		}
		if c == nil {
			if k.Conn == 0 {
				k.Conn = m.newID()
			}
			m.nextConn = max(m.nextConn, k.Conn+1)
			c = newConn(k.Conn, k)
			c.carried = !m.frozen
			m.conns[k.Tuple] = c
		}
		if p := c.needs(k.RcvNxt); p != 0 {
			from = min(from, p)
		}
		c.out.Begin(k.SndNxt)
		k.Conn = c.id
		edge := seqnum.Max(k.SndUna.Add(k.SndWnd), c.clientEdge)
		k.SndUna = seqnum.Max(k.SndUna, c.clientAck)
		k.SndWnd = k.SndUna.To(seqnum.Max(k.SndUna, edge))
		k.ClientTS, k.ServerTS = c.clientTS, c.serverTS
		k.ServerUp, k.Urgent = c.serverUp, c.serverUrgent && k.SndUna.Less(c.serverUp)
		adopted = append(adopted, k)
	}
	for t, p := range m.blocked {
		if p == notInImage && m.frozen { // in the image is what it said, if not its socket
			m.blocked[t] = inImage
		}
	}
	return adopted, from
}

// What a quarantined connection waits for; any other position is that of the
// record of a generation which has it.
const (
	notInImage stream.Position = 0
	inImage    stream.Position = math.MaxUint64 // the generation has no record yet
)

// unblock lets quarantined connections speak again that are in the image of a
// generation which has become stable.
func (m *Machine) unblock() {
	for t, p := range m.blocked {
		if p != notInImage && p <= m.stable {
			delete(m.blocked, t)
		}
	}
}

// Missing is a protected connection that an image does not have.
type Missing struct {
	Conn  stream.ConnID
	Tuple stream.FourTuple
	Open  stream.Position // its open record, 0 when its handshake is not in the log

	Embryonic bool // its client has not answered the SYN-ACK
	// Closing says that the server's FIN has been sent and all before it been
	// acknowledged: Cut is all there is to know of it.
	Closing bool
	Cut     Cut
}

// Missing are the connections that are not among adopted. The server has closed
// them, or it has not accepted them yet: TCP can tell, the machine cannot. A
// recovery has to re-create the latter, and needs their records from Open on.
func (m *Machine) Missing(adopted []Cut) []Missing {
	there := make(map[stream.ConnID]bool, len(adopted))
	for i := range adopted {
		there[adopted[i].Conn] = true
	}
	var out []Missing
	for t, c := range m.conns {
		if !there[c.id] {
			out = append(out, Missing{
				Conn: c.id, Tuple: t, Open: c.openPos, Embryonic: c.embryonic,
				Closing: c.serverFin && c.serverFinAt.LessEq(c.clientAck), Cut: c.here(),
			})
		}
	}
	return out
}

// Gone tells the machine that TCP has no such connection any more: it has given
// up, or was reset unseen.
func (m *Machine) Gone(t stream.FourTuple) {
	if c := m.conns[t]; c != nil {
		m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndReset})
		m.forget(c)
	}
}

// WantGeneration reports that connections wait for a generation before they
// can be protected.
func (m *Machine) WantGeneration() bool { return len(m.blocked) > 0 }
