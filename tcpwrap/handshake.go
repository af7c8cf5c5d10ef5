package tcpwrap

import (
	"slices"

	"github.com/ftckpt/ftckpt/stream"
)

// noteSYN keeps a SYN until the server answers it. A SYN for a connection that
// lives is not the beginning of another one unless the server says so.
func (m *Machine) noteSYN(c *conn, s *Segment) {
	if c != nil && c.opened && !c.embryonic && c.clientISN == s.Seq {
		return // once more
	}
	waits := func(h *handshake) bool { return m.syns[h.tuple] == h }
	delete(m.syns, s.Tuple)
	for len(m.syns) >= max(m.limits.Handshakes, 1) { // a SYN flood must not push us over
		var oldest *handshake
		oldest, m.synAge = first(m.synAge, waits)
		delete(m.syns, oldest.tuple)
	}
	h := &handshake{tuple: s.Tuple, isn: s.Seq, window: s.Window, wscale: s.Options.WScale, hasTS: s.Options.HasTS, tsval: s.Options.TSVal}
	h.nopt = copy(h.options[:], s.RawOptions)
	m.syns[s.Tuple] = h
	m.synAge = enqueue(m.synAge, h, m.limits.Handshakes, waits)
}

// enqueue appends v to a queue whose members lose interest by themselves; at
// most limit of them are of interest.
func enqueue[T any](q []T, v T, limit int, interests func(T) bool) []T {
	if len(q) >= 2*limit+16 {
		q = slices.DeleteFunc(q, func(v T) bool { return !interests(v) })
	}
	return append(q, v)
}

// first takes the oldest member that is of interest; there is one.
func first[T any](q []T, interests func(T) bool) (T, []T) {
	for !interests(q[0]) {
		q = q[1:]
	}
	return q[0], q[1:]
}

// established takes a SYN-ACK as the beginning of a connection. The records
// come before the SYN-ACK's release, so no client ever knows a connection that
// the log does not.
func (m *Machine) established(c *conn, s *Segment) *conn {
	if c != nil && c.opened && s.Seq == c.serverISN && s.Ack == c.clientISN.Add(1) {
		return c // once more; c may be past it
	}
	h := m.syns[s.Tuple]
	if h == nil || s.Ack != h.isn.Add(1) {
		return c
	}
	delete(m.syns, s.Tuple)
	delete(m.blocked, s.Tuple)
	if c != nil {
		m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndClosed})
		m.forget(c)
	}
	cut := Cut{
		Conn: m.newID(), Tuple: s.Tuple, RcvNxt: h.isn.Add(1), SndUna: s.Seq, SndNxt: s.Seq,
		HasTS: h.hasTS && s.Options.HasTS, ClientTS: h.tsval, ServerTS: s.Options.TSVal,
	}
	if h.wscale >= 0 && s.Options.WScale >= 0 {
		cut.SndWScale, cut.RcvWScale = uint8(h.wscale), uint8(s.Options.WScale)
	}
	c = newConn(cut.Conn, cut)
	c.opened, c.clientISN, c.serverISN = true, h.isn, s.Seq
	c.out.Begin(s.Seq.Add(1))
	m.conns[s.Tuple] = c
	m.embryo(c)
	c.openPos = m.Depend(stream.ConnOpen{Conn: c.id, Tuple: s.Tuple, ISN: h.isn, Window: h.window, Options: h.options[:h.nopt]})
	m.Depend(stream.ConnAccept{Conn: c.id, ISN: s.Seq, Options: s.RawOptions})
	return c
}

// embryo bounds the connections whose client has not answered. One that is
// pushed out and is answered after all goes unprotected until the next
// generation has it.
func (m *Machine) embryo(c *conn) {
	unanswered := func(c *conn) bool { return c.embryonic }
	for m.embryos >= max(m.limits.Handshakes, 1) {
		var oldest *conn
		oldest, m.embryAge = first(m.embryAge, unanswered)
		m.Append(stream.ConnEnd{Conn: oldest.id, Reason: stream.EndReset})
		m.forget(oldest)
	}
	c.embryonic = true
	m.embryos++
	m.embryAge = enqueue(m.embryAge, c, m.limits.Handshakes, unanswered)
}

// grown notes that a client has answered the SYN-ACK, or never will.
func (m *Machine) grown(c *conn) {
	if c.embryonic {
		c.embryonic = false
		m.embryos--
	}
}
