package replay

import (
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// pump injects what the windows allow: in the log's order, but for lagging
// connections, which go at their own pace.
func (e *Engine) pump(now time.Time) {
	for len(e.order) > 0 {
		l := e.order[0]
		at := l.injNxt
		all := l.lagging || e.inject(l) // the turn of a lagging connection is void
		if all || l.injNxt != at {
			e.headSince, e.headTries = now, 0
		}
		if !all {
			break
		}
		e.order = e.order[1:]
	}
	for _, l := range e.behind {
		for len(l.todo) > 0 && e.inject(l) {
		}
	}
}

// inject feeds a connection's next event to the restored TCP, as far as the
// window goes; it answers whether all of it went.
func (e *Engine) inject(l *line) bool {
	ev := &l.todo[0]
	if l.unborn() && ev.kind != evOpen {
		return false
	}
	switch ev.kind {
	case evAnswer:
		e.synAck(l)
	case evHeard:
		if l.unasked() {
			return false
		}
	case evOpen:
		if !l.wanted {
			if e.born-e.settledIn >= maxBirths || !e.madeWay(l.pred) {
				return false
			}
			e.bear(l)
		}
		if !l.born {
			return false
		}
	case evReset:
		if l.kAck.Less(l.injNxt) { // only at the very octet it expects does TCP take a reset
			return false
		}
		e.send(l, tcpwrap.RST|tcpwrap.ACK, l.kAck, nil)
		l.sent, l.resetSent = nil, true
	case evUrgent:
		if l.urgent && !l.injNxt.Less(l.up) && (l.upBorn > e.settledIn || l.kAck.Less(l.up)) {
			return false // TCP knows one urgent octet: the next makes one that was not taken yet an ordinary one
		}
		l.up, l.urgent = ev.seq, true
	case evFin:
		e.send(l, tcpwrap.FIN|tcpwrap.ACK, l.injNxt, nil)
		l.sent = append(l.sent, *ev)
		l.injNxt = l.injNxt.Add(1)
	default:
		for len(ev.data) > 0 {
			if !l.injNxt.Less(l.kEdge) {
				return false
			}
			n := min(len(ev.data), maxInjection, int(l.injNxt.To(l.kEdge)))
			e.send(l, tcpwrap.ACK|tcpwrap.PSH, l.injNxt, ev.data[:n])
			e.stats.Injected++
			e.stats.InjectedBytes += uint64(n)
			l.sent = append(l.sent, event{evData, l.injNxt, ev.data[:n]})
			if l.urgent && l.injNxt.Less(l.up) && l.up.LessEq(l.injNxt.Add(seqnum.Size(n))) {
				e.born++
				l.upBorn = e.born
			}
			l.injNxt = l.injNxt.Add(seqnum.Size(n))
			ev.seq, ev.data = l.injNxt, ev.data[n:]
			e.queued -= n
		}
	}
	l.todo[0] = event{}
	l.todo = l.todo[1:]
	return true
}

// send gives the restored TCP a segment from the client.
func (e *Engine) send(l *line, flags tcpwrap.Flags, seq seqnum.Value, data []byte) {
	// Never more than it has sent: TCP would drop the segment whole. Whether it
	// holds what the image says was sent for sent is its own affair; so only what
	// can be repeated without loss says so.
	ack := seqnum.Min(l.kSure, l.ack)
	if flags == tcpwrap.ACK && len(data) == 0 {
		ack = seqnum.Min(l.kNxt, l.ack)
	}
	ack, win := l.offer(ack)
	if l.told.Less(ack) {
		l.told = ack
	}
	var urgent uint16
	if n := seq.To(l.up); l.urgent && len(data) > 0 && seq.Less(l.up) && n <= 65535 {
		flags |= tcpwrap.URG
		urgent = uint16(n)
	}
	e.Ready.Send(tcpwrap.Outgoing{
		Up: true, Tuple: l.cut.Tuple, Seq: seq, Ack: ack, Flags: flags, Window: win, Urgent: urgent,
		HasTS: l.cut.HasTS, TSVal: l.clientTS, TSEcr: l.kTS, Payload: data,
	})
}

// nearly is how many units of its scale a window is short of shut for offer to
// take pains.
const nearly = 16

// offer makes the window behind an acknowledgement end exactly where the real
// client's does. A scaled window says that only at some acknowledgements, so it
// acknowledges up to 1<<scale octets less than it could when that helps. Rounded
// down, TCP might not get as far as the client is. Rounded up, it would send
// beyond a window that is shut, and wait for the retransmission of that, with a
// timeout that doubles, instead of probing until the window opens.
func (l *line) offer(ack seqnum.Value) (seqnum.Value, uint16) {
	if !ack.Less(l.edge) {
		return ack, 0
	}
	unit := seqnum.Size(1) << l.cut.SndWScale
	n := ack.To(l.edge)
	if n >= nearly*unit {
		// The window is not what limits TCP. What it keeps unacknowledged it would send
		// again after a timeout, with a window of congestion that has room for nothing
		// else, and be silent with more to say.
		return ack, uint16(min(65535, (n+unit-1)/unit))
	}
	// Only where rounding down keeps TCP from getting as far as the client is: what
	// is left unacknowledged counts as under way, and a TCP that has had a timeout
	// (its packets wait here, on a loaded host for long) sends one segment at a time.
	if over := n % unit; over != 0 && ack.Less(l.ack) && n-over < ack.To(l.ack) {
		// One that stands still all the same gets the whole acknowledgement.
		if less := ack.Sub(unit - over); l.probes == 0 && l.told.LessEq(less) {
			ack, n = less, n+unit-over
		} else if n < unit { // nothing else would let it go on
			n = unit
		}
	}
	return ack, uint16(min(65535, n/unit))
}

// acknowledge tells the restored TCP what the client has of its output.
func (e *Engine) acknowledge(l *line) {
	if e.begun && !l.unborn() && !l.resetSent && !l.kReset { // before Start there is no TCP yet: it would answer with a reset
		// At SND.NXT, where a client's own TCP sends them from. What the restored
		// TCP has acknowledged may be behind it by the time this gets there, and
		// a segment before its window is discarded with its acknowledgement. So is
		// one beyond it, which it may be when octets were injected for nothing.
		seq := l.injNxt
		if l.kEdge.Less(seq) {
			seq = l.kAck
		}
		e.send(l, tcpwrap.ACK, seq, nil)
	}
}

// hurry makes the restored TCP acknowledge at once: a duplicate gets an
// immediate ACK (RFC 9293, 3.10.7.4), where news would get a delayed one.
func (e *Engine) hurry(l *line) {
	if len(l.sent) == 0 {
		return
	}
	last := &l.sent[len(l.sent)-1]
	if last.kind == evFin {
		e.send(l, tcpwrap.FIN|tcpwrap.ACK, last.seq, nil)
		return
	}
	n := len(last.data)
	e.send(l, tcpwrap.ACK, last.end().Sub(1), last.data[n-1:])
}

// resend repeats what the restored TCP has not acknowledged: it drops what
// overruns its receive buffer, and a segment that reaches beyond its window
// whole (Linux since 6.17). So nothing reaches beyond the window as it is now.
func (e *Engine) resend(l *line) {
	for i := range min(len(l.sent), resend) {
		seq, data := l.sent[i].seq, l.sent[i].data
		if seq.Less(l.kAck) {
			seq, data = l.kAck, data[min(int(seq.To(l.kAck)), len(data)):]
		}
		if l.sent[i].kind == evFin {
			e.stats.Resent++
			e.send(l, tcpwrap.FIN|tcpwrap.ACK, seq, nil)
			return
		}
		if !seq.Less(l.kEdge) {
			if i == 0 {
				e.probe(l)
			}
			return
		}
		e.stats.Resent++
		n := min(len(data), int(seq.To(l.kEdge)))
		e.send(l, tcpwrap.ACK, seq, data[:n])
	}
}

// Tick sees to connections that do not move. Call it every few milliseconds.
func (e *Engine) Tick(now time.Time) {
	for _, l := range e.unsure {
		if l.gap != "" && !l.gone { // nothing can mend that, and nobody should wait for it
			e.doom(l, l.gap)
		}
	}
	e.sweep()
	e.pump(now)
	if e.busy && !e.live {
		e.headSince = now
		return
	}
	if len(e.order) > 0 && now.Sub(e.headSince) >= stall {
		l := e.order[0]
		e.headSince = now
		e.headTries++
		if e.headTries > stallTries {
			e.lag(l)
		} else {
			e.probe(l)
		}
	}
	e.pump(now)
	for _, l := range e.unsure {
		if e.live && l.unborn() && now.Sub(l.grew) >= handshakeTime {
			e.drop(l) // its client has given up, or never knew it
			continue
		}
		if e.live && now.Sub(l.grew) >= patience && l.silent() {
			e.condemn(l)
			continue
		}
		if l.wanted && !l.born {
			e.again(now, l)
			continue
		}
		if e.live && l.ended && now.Sub(l.grew) >= endedPatience && !l.finished() {
			e.condemn(l) // the restored server has gone another way, and nobody is there to care
			continue
		}
		turn := l.lagging || len(e.order) > 0 && e.order[0] == l // else nothing new of it may go yet
		if (len(l.sent) > 0 || len(l.todo) > 0 && turn) && now.Sub(l.moved) >= stall<<min(l.probes, maxBackoff) {
			l.moved = now
			l.probes++
			e.probe(l)
		} else if l.kNxt.Less(l.ack) && now.Sub(l.moved) >= stall<<min(l.probes, maxBackoff) {
			l.moved = now
			l.probes++
			e.acknowledge(l) // it may wait for an acknowledgement that was lost
		}
	}
	e.settle()
	e.sweep()
}

// lag lets a connection go at its own pace from now on.
func (e *Engine) lag(l *line) {
	if !l.lagging {
		l.lagging = true
		e.touch(l)
		e.behind = append(e.behind, l)
	}
}

// probe asks the restored TCP where it stands.
func (e *Engine) probe(l *line) {
	if l.wanted && !l.kSeen { // its making may have been lost
		if e.bear(l); !l.born {
			return
		}
	}
	if len(l.sent) > 0 {
		l.asked = true // acked repeats what the answer says is missing
		e.hurry(l)
		return
	}
	// Nothing is under way and the window is shut: one octet beyond it, as a
	// zero-window probe (RFC 9293, 3.8.6.1), or the octet before.
	if len(l.todo) > 0 && l.todo[0].kind == evData {
		e.send(l, tcpwrap.ACK, l.injNxt, l.todo[0].data[:1])
	}
}

// caughtUp reports whether a connection stands where the log and its client
// are.
func (l *line) caughtUp() bool {
	if l.unborn() {
		return !l.answered
	}
	if a := l.away; a != nil && (a.nxt != l.logged || a.reset && !l.reset) { // what its client sent is on its way
		return l.kReset || l.resetSent || l.gap != ""
	}
	if l.kReset || l.resetSent {
		return true
	}
	if l.ended {
		return l.gap != "" || len(l.todo) == 0 && l.injNxt.LessEq(l.kAck)
	}
	return l.gap == "" && !l.reset && len(l.todo) == 0 && l.injNxt.LessEq(l.kAck) && l.ack.LessEq(l.kNxt)
}

// settled reports whether nothing is left to do for a connection, now and as
// time passes, until something is heard of it.
func (l *line) settled() bool {
	return !l.lagging && l.gap == "" && !l.unborn() && l.caughtUp() && len(l.sent) == 0 && len(l.todo) == 0 && l.ack.LessEq(l.kNxt)
}

// Done reports whether every connection that does not lag has caught up with
// the log and its client.
func (e *Engine) Done() bool {
	if !e.fed || len(e.order) > 0 {
		return false
	}
	for _, l := range e.unsure {
		if !l.caughtUp() && (!l.lagging || l.gap != "") {
			return false
		}
	}
	return true
}

// silent reports whether the restored server has all that the log holds and
// yet has not made what its client has of the old one.
func (l *line) silent() bool {
	return l.gap != "" || !l.reset && (len(l.todo) == 0 || l.unasked()) && l.injNxt.LessEq(l.kAck) && l.kNxt.Less(l.ack)
}

// unasked reports whether an answer waits for its question (heardThen).
func (l *line) unasked() bool {
	return len(l.todo) > 0 && l.todo[0].kind == evHeard && l.kNxt.Less(l.todo[0].seq)
}

// over reports whether the connection has ended in both directions.
func (l *line) over() bool {
	return l.ended || l.finished()
}

// finished reports whether the restored TCP has nothing left to say to the
// client: both FINs are acknowledged, or there was a reset.
func (l *line) finished() bool {
	return l.kReset || l.resetSent || l.gap != "" || l.finLogged && l.logged.LessEq(l.kAck) && l.kFin && l.kNxt.LessEq(l.ack)
}
