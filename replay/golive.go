package replay

import (
	"fmt"
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Condemned is a survivor that could not be brought to where its client
// stands.
type Condemned struct {
	Conn  stream.ConnID
	Tuple stream.FourTuple
	Why   string
}

// Condemn gives up the connections that cannot catch up: where a recovery
// cannot be exact it resets that connection and says so (promise 4). Both ends
// are told, the client at go-live. One whose server has yet to read what the log
// holds for it is not wrong, only late: it lags from now on.
func (e *Engine) Condemn() []Condemned {
	for _, l := range e.lines {
		switch {
		case l.caughtUp() || l.lagging && l.gap == "":
		case l.gap != "":
			e.doom(l, l.gap)
		case l.unborn():
			e.doom(l, "it was not re-created")
		case l.silent():
			e.doom(l, fmt.Sprintf("the client has %d octets that the restored server did not send again", l.kNxt.To(l.ack)))
		default:
			e.lag(l)
		}
	}
	e.sweep()
	return e.Condemned()
}

// Condemned answers the connections given up since it was last asked.
func (e *Engine) Condemned() []Condemned {
	out := e.doomed
	e.doomed = nil
	return out
}

// doom condemns a connection and says why; sweep must follow. The client of one
// that has ended is not there to be told.
func (e *Engine) doom(l *line, why string) {
	if !l.ended {
		e.doomed = append(e.doomed, Condemned{l.cut.Conn, l.cut.Tuple, why})
	}
	e.condemn(l)
}

// condemn resets a connection at both ends; sweep must follow. Where exactly
// the restored TCP stands is not known before it acknowledges, so it is told at
// every place that can be: were it left alive, and the client's reset lost, the
// client would take what it says for the truth.
func (e *Engine) condemn(l *line) {
	if l.redial == nil || l.redial.met { // else no TCP has it
		e.send(l, tcpwrap.RST|tcpwrap.ACK, l.kAck, nil)
	}
	for i := range l.sent {
		e.send(l, tcpwrap.RST|tcpwrap.ACK, l.sent[i].end(), nil)
	}
	if !l.ended {
		e.stats.Condemned++
		e.Ready.Send(tcpwrap.Outgoing{Tuple: l.cut.Tuple, Seq: l.ack, Ack: l.logged, Flags: tcpwrap.RST | tcpwrap.ACK})
	}
	e.drop(l)
}

// drop gives a connection up; sweep must follow.
func (e *Engine) drop(l *line) {
	for i := range l.todo {
		e.queued -= len(l.todo[i].data)
	}
	for _, id := range l.kept {
		e.Ready.Decide(id, tcpwrap.Drop)
	}
	l.kept = nil
	l.gone, e.swept = true, false
	if e.conns[l.cut.Tuple] == l {
		delete(e.conns, l.cut.Tuple)
		if !l.born && l.pred != nil && !l.pred.gone {
			e.conns[l.cut.Tuple] = l.pred
		}
	}
	delete(e.byID, l.cut.Conn)
}

// sweep takes the connections that were dropped out of every queue.
func (e *Engine) sweep() {
	if e.swept {
		return
	}
	e.swept = true
	gone := func(l *line) bool { return l.gone }
	e.lines = slices.DeleteFunc(e.lines, gone)
	e.order = slices.DeleteFunc(e.order, gone)
	e.behind = slices.DeleteFunc(e.behind, gone)
	e.unsure = slices.DeleteFunc(e.unsure, gone)
}

// GoLive ends the roll-forward: what was kept for the clients leaves, and each
// client gets one ACK that puts its retransmission timer right (66 ms of stall
// with it, 240 without). The answer is where each connection stands now, for
// the machine that protects it from here on, and the clients' packets that
// waited, to be handed to that machine in order. Connections that lag stay with
// the engine until Joined gives them up.
func (e *Engine) GoLive() (cuts []tcpwrap.Cut, waiting []Waiting) {
	e.live = true
	for _, l := range e.lines {
		for _, id := range l.kept {
			e.Ready.Decide(id, tcpwrap.Accept)
		}
		l.kept = nil
		if !l.caughtUp() || l.unborn() || l.ended && !l.finished() {
			e.lag(l)
		}
	}
	for _, l := range e.lines {
		if l.expired {
			l.ended = false // its client is there
			e.doom(l, "it was idle for so long that it was no longer protected")
		}
	}
	e.sweep()
	cuts = e.Joined()
	for _, w := range e.waiting {
		if e.conns[w.Segment.Tuple] != nil { // lagging: the client sends it again
			e.Ready.Decide(w.ID, tcpwrap.Drop)
			continue
		}
		waiting = append(waiting, w)
	}
	e.waiting, e.waitingOctets, e.waitingSYNs = nil, 0, nil
	return cuts, waiting
}

// Joined gives up the lagging connections that have caught up since.
func (e *Engine) Joined() []tcpwrap.Cut {
	var cuts []tcpwrap.Cut
	for _, l := range e.lines {
		if !e.live || !l.caughtUp() || l.unborn() || l.ended && !l.finished() {
			continue // what the server still says on one that has ended, nobody may hear
		}
		if !l.over() {
			e.nudge(l)
			if l.away != nil && e.long {
				e.prompt(l, l.kAck)
			}
			cuts = append(cuts, l.here())
		}
		e.drop(l)
	}
	e.sweep()
	return cuts
}

// Owns reports whether packets of a connection belong to the engine. After
// GoLive these are the lagging ones alone.
func (e *Engine) Owns(t stream.FourTuple) bool { return !e.live || e.conns[t] != nil }

// Lagging is the number of connections that the engine still feeds, or has
// made; those that wait for the answer to a SYN-ACK are not among them.
func (e *Engine) Lagging() int {
	n := 0
	for _, l := range e.lines {
		if !l.unborn() || l.wanted {
			n++
		}
	}
	return n
}

// Remaining is the number of connections the engine still has.
func (e *Engine) Remaining() int { return len(e.conns) }

// Stats answers the counts.
func (e *Engine) Stats() Stats { return e.stats }

func (l *line) here() tcpwrap.Cut {
	c := l.cut
	c.RcvNxt, c.ClientFin = l.logged, l.finLogged
	c.SndUna = seqnum.Min(l.ack, l.kNxt)
	c.SndNxt, c.ServerFin = l.kNxt, l.kFin
	c.SndWnd = 0
	if c.SndUna.Less(l.edge) {
		c.SndWnd = c.SndUna.To(l.edge)
	}
	c.ClientTS, c.ServerTS = l.clientTS, l.kTS
	c.RcvWnd = 0
	if l.away != nil && l.logged.Less(l.away.offered) {
		c.RcvWnd = l.logged.To(l.away.offered)
	}
	c.ServerUp, c.Urgent = l.serverUp, l.serverUrgent && c.SndUna.Less(l.serverUp)
	return c
}

// Greet asks every client where it stands, as soon as packets reach it from
// here: the log knows only what was stable when the primary died. An octet that
// the client has makes its TCP answer with its present acknowledgement, as a
// keep-alive does (RFC 9293, 3.8.4). A client that does not answer in time
// costs nothing but time after go-live.
func (e *Engine) Greet() {
	for _, l := range e.lines {
		if l.ended || l.unborn() && !l.answered {
			continue
		}
		o := tcpwrap.Outgoing{
			Tuple: l.cut.Tuple, Seq: l.ack.Sub(1), Ack: l.cut.RcvNxt, Flags: tcpwrap.ACK,
			HasTS: l.cut.HasTS, TSVal: l.kTS, TSEcr: l.clientTS,
		}
		if l.away != nil {
			o.Ack, o.Window = l.away.stable, l.away.window(l.cut.RcvWScale)
		}
		e.Ready.Send(o)
	}
}

func (e *Engine) nudge(l *line) {
	var win uint16
	if l.kAck.Less(l.kEdge) {
		win = uint16(min(65535, uint32(l.kAck.To(l.kEdge))>>l.cut.RcvWScale))
	}
	e.Ready.Send(tcpwrap.Outgoing{
		Tuple: l.cut.Tuple, Seq: l.kNxt, Ack: l.kAck, Flags: tcpwrap.ACK, Window: win,
		HasTS: l.cut.HasTS, TSVal: l.kTS, TSEcr: l.clientTS,
	})
}
