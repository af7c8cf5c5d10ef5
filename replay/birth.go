package replay

import (
	"cmp"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// handshakeTime is how long after go-live the answer to a SYN-ACK of the old
// primary is waited for.
const handshakeTime = 60 * time.Second

// Newborn is a connection that is younger than the generation: its handshake is
// in the log, and the restored TCP has no trace of it.
type Newborn struct {
	Open     stream.ConnOpen
	OpenPos  stream.Position
	Accept   stream.ConnAccept
	State    stream.ConnState // newest in the log
	Known    bool             // State was logged, and is not merely the handshake's
	Answered bool             // the client is known to have acknowledged the SYN-ACK
	Ended    bool             // it is over: what it made the server do is not
	Expired  bool             // and its client has not heard of it, see Survivor
	Digests  []stream.OutDigest
	Logged   Instream // what its client has said
	TS       uint32   // the server's timestamp clock as it has to go on
}

// Birth is the wish to have a connection re-created in the restored TCP, with
// the sequence numbers and clocks it had. It is carried out after the segments
// of the same Ready are sent, and takes as long as it takes: nothing is injected
// into the connection, nor behind it in the log's order, before Delivered.
type Birth struct {
	Open               stream.ConnOpen
	Accept             stream.ConnAccept
	ClientTS, ServerTS uint32
	Edge               seqnum.Value // right edge of the client's window
	Again              bool         // it was delivered, but nothing has been heard of the connection
}

// Newborns are the connections that a recovery from a generation has to
// re-create, in the order in which they were opened: those opened after its cut,
// and those that the server had not accepted by then, which no image has. Those
// that have ended since are among them: the server must read again what they
// said. at gives the timestamp clock of a connection whose last known TSval was
// seen at that time.
func (l *Ledger) Newborns(cut stream.Position, unaccepted map[stream.ConnID]bool, at func(ts uint32, seen time.Time) uint32) []Newborn {
	var out []Newborn
	for id, ln := range l.lines {
		if !ln.opened || !ln.accepted || ln.dialled || ln.openPos <= cut && !unaccepted[id] {
			continue
		}
		if ln.Ended && ln.Reason == stream.EndQuarantine {
			continue
		}
		n := Newborn{Open: ln.open, OpenPos: ln.openPos, Accept: ln.accept, State: ln.State, Known: ln.Known, Ended: ln.Ended, Digests: ln.Digests, Logged: ln.Logged}
		n.Expired = n.Ended && ln.Reason == stream.EndExpired
		n.Answered = ln.answered || ln.Known && ln.accept.ISN.Less(ln.State.ClientAck)
		opts := tcpwrap.ParseOptions(ln.accept.Options, true)
		if ts, seen := opts.TSVal, ln.acceptAt; opts.HasTS {
			if ln.Known && ln.State.ServerTS != 0 {
				ts, seen = ln.State.ServerTS, ln.StateAt
			}
			n.TS = at(ts, seen)
		}
		if n.Ended && !n.Answered {
			continue
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Newborn) int { return cmp.Compare(a.Open.Conn, b.Open.Conn) })
	return out
}

// AddNewborns tells the engine, before Start, which connections it has to have
// re-created. It answers those that it takes: one whose 4-tuple another
// connection of this recovery has cannot be told from it, unless that one has
// ended: it is then re-created when the restored TCP has done with the other.
func (e *Engine) AddNewborns(ns []Newborn) (taken map[stream.ConnID]bool) {
	taken = map[stream.ConnID]bool{}
	for i := range ns {
		n := &ns[i]
		pred := e.conns[n.Open.Tuple]
		if pred != nil && !pred.ended {
			continue
		}
		syn, synack := tcpwrap.ParseOptions(n.Open.Options, true), tcpwrap.ParseOptions(n.Accept.Options, true)
		first := n.Open.ISN.Add(1)
		l := &line{
			birth: &Birth{Open: n.Open, Accept: n.Accept, ServerTS: n.TS}, answered: n.Answered, ended: n.Ended, expired: n.Expired, pred: pred,
			injNxt: first, logged: first, kAck: first, kEdge: first.Add(firstCredit),
			ack: n.Accept.ISN.Add(1), told: n.Accept.ISN.Add(1), kNxt: n.Accept.ISN.Add(1), kSure: n.Accept.ISN.Add(1), kTS: n.TS,
		}
		l.cut = tcpwrap.Cut{
			Conn: n.Open.Conn, Tuple: n.Open.Tuple, RcvNxt: first, SndUna: l.ack, SndNxt: l.ack,
			HasTS: syn.HasTS && synack.HasTS, ServerTS: n.TS,
			Open: n.OpenPos,
		}
		if syn.WScale >= 0 && synack.WScale >= 0 {
			l.cut.SndWScale, l.cut.RcvWScale = uint8(syn.WScale), uint8(synack.WScale)
		}
		l.compareWith(n.Digests)
		l.edge = l.ack.Add(seqnum.Size(n.Open.Window)) // a SYN's window is never scaled
		if l.cut.HasTS {
			l.clientTS = syn.TSVal
		}
		if n.Known {
			l.ack = seqnum.Max(l.ack, n.State.ClientAck)
			l.edge = seqnum.Max(l.edge, n.State.ClientEdge)
			l.heardTS(n.State.ClientTS)
			l.state = n.State
			l.leave(n.Logged, false, n.State.ServerEdge) // without it nobody knows its window
		}
		e.add(l)
		taken[l.cut.Conn] = true
	}
	return taken
}

// unborn reports whether the restored TCP does not have the connection yet.
func (l *line) unborn() bool {
	return l.birth != nil && !l.born || l.redial != nil && !l.redial.met
}

// Unanswered are the connections that still wait for their clients to answer the
// old primary's SYN-ACK. No TCP has them, so no image does either, and the
// machine does not know them: a generation has to name them, and a recovery from
// it needs their records from Open on.
func (e *Engine) Unanswered() []tcpwrap.Missing {
	var out []tcpwrap.Missing
	for _, l := range e.lines {
		if l.birth != nil && l.unborn() {
			out = append(out, tcpwrap.Missing{Conn: l.cut.Conn, Tuple: l.cut.Tuple, Open: l.cut.Open})
		}
	}
	return out
}

// opened is the turn of a connection's open record. A connection whose client
// has not answered the SYN-ACK waits for that answer: TCP would, too.
func (e *Engine) opened(id stream.ConnID) {
	l := e.byID[id]
	if l == nil || !l.unborn() || !l.answered || l.openQueued {
		return
	}
	l.openQueued = true
	e.touch(l)
	l.todo = append(l.todo, event{kind: evOpen, seq: l.injNxt})
	e.order = append(e.order, l)
}

// bear has the connection re-created, or what was asked for repeated.
func (e *Engine) bear(l *line) {
	l.wanted, l.wantedAt = true, time.Time{} // Tick looks at the clock
	e.touch(l)
	b := *l.birth
	b.ClientTS, b.Edge, b.Again = l.clientTS, l.edge, l.born
	e.Births = append(e.Births, b)
}

// Delivered says that a birth has been done: the restored TCP has the connection,
// or will have it before anything that is sent from now on. Said twice, it is
// said once.
func (e *Engine) Delivered(now time.Time, id stream.ConnID) {
	l := e.byID[id]
	if l == nil || !l.wanted || l.born {
		return
	}
	l.born, l.moved, l.grew = true, now, now
	e.born++
	e.stats.Born++
	e.touch(l)
	e.pump(now)
}

// again repeats a birth that nothing has come of for a while.
func (e *Engine) again(now time.Time, l *line) {
	switch {
	case l.wantedAt.IsZero():
		l.wantedAt = now
	case now.Sub(l.wantedAt) >= stall<<min(l.probes, maxBackoff):
		l.probes++
		e.bear(l)
	}
}

// Stillborn says that a birth failed for good: the connection is reset and
// told in the answer.
func (e *Engine) Stillborn(id stream.ConnID) {
	if l := e.byID[id]; l != nil && l.birth != nil {
		e.condemn(l)
		e.sweep()
	}
}

// there is the connection that the restored TCP has at these addresses: the
// newest that was born.
func (e *Engine) there(t stream.FourTuple) *line {
	l := e.conns[t]
	for l != nil && l.unborn() {
		if l = l.pred; l != nil && l.gone {
			l = nil
		}
	}
	return l
}

// madeWay reports whether the restored TCP has done with a connection that has
// ended, so that another can have its addresses. Where only the server has closed
// it, because the client was reset by the old one, it is helped along.
func (e *Engine) madeWay(l *line) bool {
	if l == nil || l.gone || l.kReset || l.resetSent {
		return true
	}
	if l.unborn() || len(l.todo) > 0 || l.kAck.Less(l.injNxt) || !l.kFin || l.ack.Less(l.kNxt) {
		return false
	}
	if !l.finLogged {
		e.send(l, tcpwrap.RST|tcpwrap.ACK, l.kAck, nil)
		l.resetSent = true
	}
	return true
}

// Lost says that TCP could not be given a connection of the generation: it is
// reset.
func (e *Engine) Lost(t stream.FourTuple) {
	if l := e.conns[t]; l != nil {
		e.condemn(l)
		e.sweep()
	}
}

// answeredNow is called for every packet of the client of an unborn connection
// that waits for the answer to its SYN-ACK. It reports whether the packet ends
// the wait for nothing: a client that begins anew never got the SYN-ACK. The same
// SYN once more does not say so, for the SYN-ACK may be on its way: it is sent
// again, and must be the old one.
func (e *Engine) answeredNow(l *line, s *tcpwrap.Segment) (forgotten bool) {
	switch {
	case !e.begun || l.answered:
	case s.Flags.Has(tcpwrap.SYN) && s.Seq == l.birth.Open.ISN:
		e.Ready.Send(tcpwrap.Outgoing{
			Tuple: l.cut.Tuple, Seq: l.birth.Accept.ISN, Ack: l.injNxt, Flags: tcpwrap.SYN | tcpwrap.ACK,
			Window: firstCredit, Options: l.birth.Accept.Options,
		})
	case s.Flags.Has(tcpwrap.SYN) || s.Flags.Has(tcpwrap.RST):
		e.drop(l)
		e.sweep()
		return true
	case s.Flags.Has(tcpwrap.ACK) && l.birth.Accept.ISN.Less(s.Ack):
		l.answered = true
		e.bear(l)
	}
	return false
}
