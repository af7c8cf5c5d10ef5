package replay

import (
	"cmp"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
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
// of the roll-forward. A SYN opens one: one that the old server had dialled, or one
// that it had not come to yet, which is for the machine that protects the others
// from go-live on. Of anything else nobody may hear.
func (e *Engine) unknown(now time.Time, id tcpwrap.PacketID, s *tcpwrap.Segment) (judged bool) {
	switch {
	case e.live:
		return false
	case s.Flags.Has(tcpwrap.SYN) && !s.Flags.Has(tcpwrap.ACK):
		if !e.redialled(now, id, s) {
			e.keep(id, s)
		}
	default:
		e.Ready.Decide(id, tcpwrap.Drop)
	}
	return true
}

// Redial is a connection that the server dialled after the generation: its
// handshake is in the log, and the restored server dials again.
type Redial struct {
	Dial     stream.ConnDial
	DialPos  stream.Position
	Answer   stream.ConnAnswer // when Answered
	Answered bool              // the peer's SYN-ACK was logged
	Refused  bool              // and instead of it, its RST
	State    stream.ConnState
	Known    bool // State was logged
	Ended    bool // it is over: what it made the server do is not
	Digests  []stream.OutDigest
	// TS is the server's timestamp clock as it has to go on, at the time At.
	TS uint32
	At time.Time
}

// Redials are the connections that the restored server is going to dial again,
// in the order in which the old one did: those dialled after the cut, and those
// whose SYN was under way then. at gives a timestamp clock's present value.
func (l *Ledger) Redials(cut stream.Position, dialling map[stream.ConnID]bool, now time.Time, at func(ts uint32, seen time.Time) uint32) []Redial {
	var out []Redial
	for id, ln := range l.lines {
		if !ln.dialled || ln.openPos <= cut && !dialling[id] || ln.Ended && ln.Reason == stream.EndQuarantine {
			continue
		}
		d := Redial{
			Dial: ln.dial, DialPos: ln.openPos, Answer: ln.answer, Answered: ln.accepted, Refused: ln.refused,
			State: ln.State, Known: ln.Known, Ended: ln.Ended, Digests: ln.Digests, At: now,
		}
		ts, seen := tcpwrap.ParseOptions(ln.dial.Options, true).TSVal, ln.acceptAt
		if ln.Known && ln.State.ServerTS != 0 {
			ts, seen = ln.State.ServerTS, ln.StateAt
		}
		d.TS = at(ts, seen)
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b Redial) int { return cmp.Compare(a.DialPos, b.DialPos) })
	return out
}

// redial is what an Engine knows of a Redial beside its line.
type redial struct {
	Redial
	line *line // nil: never answered, so the dial is made anew at go-live
	met  bool  // the restored server has dialled
	told bool  // and was given the peer's SYN-ACK
}

// AddRedials tells the engine, before Start, what the restored server is going
// to dial. It answers the connections that it takes, as AddNewborns does.
func (e *Engine) AddRedials(ds []Redial) (taken map[stream.ConnID]bool) {
	taken = map[stream.ConnID]bool{}
	for i := range ds {
		d := &redial{Redial: ds[i]}
		e.redials = append(e.redials, d)
		if e.conns[d.Dial.Tuple] != nil || !d.Answered && !d.Refused {
			continue // only to keep the order
		}
		syn, synack := tcpwrap.ParseOptions(d.Dial.Options, true), tcpwrap.ParseOptions(d.Answer.Options, true)
		ours, first := d.Dial.ISN.Add(1), d.Answer.ISN.Add(1)
		l := &line{
			redial: d, answered: true, ended: d.Ended, heardSeq: ours,
			injNxt: first, logged: first, kAck: first, kEdge: first.Add(firstCredit),
			ack: ours, kNxt: ours, kSure: ours, kTS: d.TS,
			edge: ours.Add(seqnum.Size(d.Answer.Window)), // never scaled
		}
		l.cut = tcpwrap.Cut{
			Conn: d.Dial.Conn, Tuple: d.Dial.Tuple, RcvNxt: first, SndUna: ours, SndNxt: ours,
			HasTS: syn.HasTS && synack.HasTS, ServerTS: d.TS, Open: d.DialPos, Dialled: true,
		}
		if syn.WScale >= 0 && synack.WScale >= 0 {
			l.cut.SndWScale, l.cut.RcvWScale = uint8(synack.WScale), uint8(syn.WScale)
		}
		if l.cut.HasTS {
			l.clientTS = synack.TSVal
		}
		l.compareWith(d.Digests)
		if d.Known {
			l.ack = seqnum.Max(l.ack, d.State.ClientAck)
			l.edge = seqnum.Max(l.edge, d.State.ClientEdge)
			l.heardTS(d.State.ClientTS)
			l.state = d.State
		}
		d.line = l
		e.add(l)
		taken[l.cut.Conn] = true
	}
	return taken
}

// dialAnswered is the turn of a peer's SYN-ACK, or of its refusal.
func (e *Engine) dialAnswered(id stream.ConnID, ev event) {
	l := e.byID[id]
	if l == nil || l.redial == nil || l.openQueued {
		return
	}
	l.openQueued = true
	e.touch(l)
	if ev.kind == evReset {
		l.reset = true
	}
	l.todo = append(l.todo, ev)
	e.order = append(e.order, l)
}

// redialled takes a SYN of the restored server's: it is the next one that the
// old server sent to that peer, and from here on its numbers are translated into
// those which the peer knows. A socket that is dialling in the image has the old
// numbers still. It reports whether there is such a dial.
func (e *Engine) redialled(now time.Time, id tcpwrap.PacketID, s *tcpwrap.Segment) bool {
	i := slices.IndexFunc(e.redials, func(d *redial) bool {
		return !d.met && d.Dial.Tuple == s.Tuple && d.Dial.ISN == s.Seq
	})
	if i < 0 {
		i = slices.IndexFunc(e.redials, func(d *redial) bool { return !d.met && d.Dial.Tuple.Client == s.Tuple.Client })
	}
	if i < 0 {
		return false
	}
	d := e.redials[i]
	d.met = true
	l := d.line
	if l == nil || l.gone {
		return false
	}
	old, theirs := tcpwrap.ParseOptions(d.Dial.Options, true), tcpwrap.ParseOptions(d.Answer.Options, true)
	tr := tcpwrap.Translation{Seq: s.Seq.To(d.Dial.ISN)}
	if p, q := d.Dial.Tuple.Server.Port(), s.Tuple.Server.Port(); p != q {
		tr.Port = tcpwrap.Pair[uint16]{Wire: p, TCP: q}
	}
	if l.cut.HasTS {
		l.kTS = d.TS + uint32(now.Sub(d.At).Milliseconds())
		tr.TS = l.kTS - s.Options.TSVal
	}
	if old.WScale >= 0 && theirs.WScale >= 0 {
		tr.Rcv = tcpwrap.Pair[uint8]{Wire: uint8(old.WScale), TCP: uint8(max(s.Options.WScale, 0))}
		tr.Snd = tcpwrap.Pair[uint8]{Wire: uint8(theirs.WScale), TCP: uint8(theirs.WScale)}
	}
	if l.cut.HasTS && !s.Options.HasTS || old.WScale >= 0 && theirs.WScale >= 0 && s.Options.WScale < 0 {
		l.gap = "the restored TCP does not offer the options that its peer was told of (net.ipv4.tcp_timestamps, tcp_window_scaling)"
	}
	e.Dialled = append(e.Dialled, tcpwrap.Translated{
		Tuple: d.Dial.Tuple, Translation: tr, ClientISN: d.Answer.ISN, ServerISN: d.Dial.ISN,
	})
	l.moved, l.grew = now, now
	e.touch(l)
	e.Ready.Decide(id, tcpwrap.Drop)
	e.pump(now)
	return true
}

// synAgain takes a SYN that the restored TCP sends once more.
func (e *Engine) synAgain(l *line, id tcpwrap.PacketID) {
	e.Ready.Decide(id, tcpwrap.Drop)
	if l.redial.told && !l.kSeen {
		e.synAck(l)
	}
}

// synAck gives the restored TCP the peer's SYN-ACK as it was logged, but for the
// clocks.
func (e *Engine) synAck(l *line) {
	l.redial.told = true
	o := tcpwrap.Outgoing{
		Up: true, Tuple: l.cut.Tuple, Seq: l.redial.Answer.ISN, Ack: l.redial.Dial.ISN.Add(1), Flags: tcpwrap.SYN | tcpwrap.ACK,
		Window: l.redial.Answer.Window, HasTS: l.cut.HasTS, TSVal: l.clientTS, TSEcr: l.kTS,
	}
	o.Options = tcpwrap.SYNOptions(tcpwrap.ParseOptions(l.redial.Answer.Options, true))
	e.Ready.Send(o)
}

// GiveUpDials condemns the connections that the old server dialled, whose peers
// have answered, and that the restored one has not dialled again: it went another
// way. Call it right before GoLive.
func (e *Engine) GiveUpDials() {
	for _, l := range e.lines {
		if l.redial != nil && l.unborn() && !l.gone {
			e.stats.Divergences++
			e.doom(l, "the restored server did not open it again")
		}
	}
	e.sweep()
}
