package tcpwrap

import "github.com/ftckpt/ftckpt/stream"

// dial is a SYN of the server's own that has no answer yet. From the SYN-ACK on
// the connection is one like the others: what the peer sends is the instream.
type dial struct {
	id     stream.ConnID
	tuple  stream.FourTuple
	isn    seqValue
	wscale int8
	hasTS  bool
	tsval  uint32
	pos    stream.Position // of its record
}

// dialled takes a SYN of the server's. Its record comes before its release, so
// that no peer ever knows a connection that the log does not.
func (m *Machine) dialled(c *conn, s *Segment) {
	if d := m.dials[s.Tuple]; d != nil {
		if d.isn == s.Seq {
			return // once more
		}
		m.giveUp(d)
	}
	if c != nil {
		if c.dialled && c.opened && c.serverISN == s.Seq {
			return // sent again just before the answer came
		}
		m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndClosed})
		m.forget(c)
	}
	delete(m.syns, s.Tuple)
	delete(m.blocked, s.Tuple)
	waits := func(d *dial) bool { return m.dials[d.tuple] == d }
	for len(m.dials) >= max(m.limits.Handshakes, 1) {
		var oldest *dial
		oldest, m.dialAge = first(m.dialAge, waits)
		m.giveUp(oldest)
	}
	d := &dial{id: m.newID(), tuple: s.Tuple, isn: s.Seq, wscale: s.Options.WScale, hasTS: s.Options.HasTS, tsval: s.Options.TSVal}
	m.dials[s.Tuple] = d
	m.dialAge = enqueue(m.dialAge, d, m.limits.Handshakes, waits)
	d.pos = m.Depend(stream.ConnDial{Conn: d.id, Tuple: s.Tuple, ISN: s.Seq, Window: s.Window, Options: s.RawOptions})
}

func (m *Machine) giveUp(d *dial) {
	m.Append(stream.ConnEnd{Conn: d.id, Reason: stream.EndReset})
	delete(m.dials, d.tuple)
}

// answered takes a peer's SYN-ACK. One that answers no dial is TCP's affair. It
// reports whether the packet may go on.
func (m *Machine) answered(s *Segment) bool {
	d := m.dials[s.Tuple]
	if d == nil || s.Ack != d.isn.Add(1) {
		return true
	}
	if m.congested {
		m.stats.Refused++
		return false
	}
	delete(m.dials, s.Tuple)
	cut := Cut{
		Conn: d.id, Tuple: s.Tuple, RcvNxt: s.Seq.Add(1), SndUna: s.Ack, SndNxt: s.Ack,
		SndWnd: seqSize(s.Window), // never scaled (RFC 7323, 2.2)
		HasTS:  d.hasTS && s.Options.HasTS, ClientTS: s.Options.TSVal, ServerTS: d.tsval,
		Open: d.pos, Dialled: true,
	}
	if d.wscale >= 0 && s.Options.WScale >= 0 {
		cut.SndWScale, cut.RcvWScale = uint8(s.Options.WScale), uint8(d.wscale)
	}
	c := newConn(cut.Conn, cut)
	c.opened, c.clientISN, c.serverISN = true, s.Seq, d.isn
	c.out.Begin(s.Ack)
	m.conns[s.Tuple] = c
	m.Depend(stream.ConnAnswer{Conn: c.id, ISN: s.Seq, Window: s.Window, Options: s.RawOptions})
	return true
}

// refused takes a peer's RST in answer to a SYN: it counts only with the right
// acknowledgement (RFC 9293, 3.10.7.3).
func (m *Machine) refused(s *Segment) {
	d := m.dials[s.Tuple]
	if d == nil || !s.Flags.Has(ACK) || s.Ack != d.isn.Add(1) {
		return
	}
	m.Depend(stream.ClientReset{Conn: d.id, Seq: s.Seq})
	delete(m.dials, s.Tuple)
}

// Dialling are the dials without an answer whose sockets are in an image, as
// there says; a recovery needs their records. The others have been given up, by
// the server or by its TCP, and are over.
func (m *Machine) Dialling(there func(stream.FourTuple) bool) []Missing {
	var out []Missing
	for t, d := range m.dials {
		if there(t) {
			out = append(out, Missing{Conn: d.id, Tuple: t, Open: d.pos})
		} else {
			m.giveUp(d)
		}
	}
	return out
}

// SYNOptions is the raw form of what a SYN or SYN-ACK says, without timestamps:
// those are in Outgoing.
func SYNOptions(o Options) []byte {
	var b []byte
	if o.MSS != 0 {
		b = append(b, optMSS, 4, byte(o.MSS>>8), byte(o.MSS))
	}
	if o.SACKPermitted {
		b = append(b, optNop, optNop, optSACKPerm, 2)
	}
	if o.WScale >= 0 {
		b = append(b, optNop, optWScale, 3, byte(o.WScale))
	}
	return b
}
