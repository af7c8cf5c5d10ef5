package replay

import (
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// answeredBy takes a peer's SYN-ACK to a dial.
func (ln *Line) answeredBy(r stream.ConnAnswer) {
	if !ln.dialled {
		return // a log that begins behind the dial
	}
	ln.accepted, ln.answer = true, r
	if !ln.Known {
		first := ln.dial.ISN.Add(1)
		ln.State = stream.ConnState{Conn: r.Conn, ClientAck: first, ClientEdge: first, ServerNxt: first}
	}
}

// heardThen is the turn of a state record of a connection that the server
// dialled: what the log has of the peer behind it is an answer to what the peer
// had got by then. The restored server must have said as much before it is
// given the answer, as the old one had. Clients are fed without that wait: what
// they say is no answer, and servers read ahead.
func (e *Engine) heardThen(r stream.ConnState) {
	l := e.byID[r.Conn]
	if l == nil || !l.cut.Dialled || l.reset || l.gap != "" || l.finLogged || r.ClientAck.LessEq(l.heardSeq) {
		return
	}
	l.heardSeq = r.ClientAck
	e.touch(l)
	l.todo = append(l.todo, event{kind: evHeard, seq: r.ClientAck})
	if !l.lagging {
		e.order = append(e.order, l)
	}
}

// unknown is a segment of the restored server's that belongs to no connection
// of the roll-forward. A SYN opens one, which is for the machine that protects
// the others from go-live on. Of anything else nobody may hear.
func (e *Engine) unknown(id tcpwrap.PacketID, s *tcpwrap.Segment) (judged bool) {
	switch {
	case e.live:
		return false
	case s.Flags.Has(tcpwrap.SYN) && !s.Flags.Has(tcpwrap.ACK):
		e.keep(id, s)
	default:
		e.Ready.Decide(id, tcpwrap.Drop)
	}
	return true
}
