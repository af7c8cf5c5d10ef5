package replay

import (
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// This file is the service while its server is away: from the moment the address
// is here until the restored TCP speaks for itself (the patent's keep-alive
// acknowledgements). Clients' octets are logged in the new epoch, acknowledged
// once they are stable, and then fed to the restored TCP behind the rest of the
// log. So clients' retransmission timers do not back off, and a takeover that dies
// in the middle loses nothing: the next one finds the octets in the log.

// Instream is what the log has of a client's octets without a gap.
type Instream struct {
	first, next seqnum.Value
	some, Fin   bool
}

// maxRun bounds a run, so that its ends can be compared.
const maxRun = 1 << 30

// add takes a record of n octets.
func (r *Instream) add(seq seqnum.Value, n int, fin bool) {
	end := seq.Add(seqnum.Size(n))
	if !r.some || r.next.Less(seq) {
		r.first, r.next, r.some = seq, end, true
	}
	r.next = seqnum.Max(r.next, end)
	if r.first.To(r.next) > maxRun {
		r.first = r.next.Sub(maxRun)
	}
	r.Fin = r.Fin || fin
}

// from is the end of what the log has from seq on, and false when it lacks
// something there.
func (r Instream) from(seq seqnum.Value) (edge seqnum.Value, ok bool) {
	if !r.some {
		return seq, true
	}
	return seqnum.Max(seq, r.next), r.first.LessEq(seq) || r.next.LessEq(seq)
}

// Bounds of what is taken while the server is away.
const (
	// maxAway is how many octets may have been taken and not been injected yet,
	// over all connections; each is bounded by the window that its client has.
	maxAway = 256 << 20
	// promptsEach is how often a client is asked to retransmit: each time halves
	// the timeout it waits for, and Linux doubles it 10 times at most before it
	// stays at two minutes.
	promptsEach = 12
)

// Journal gives a record its place in the log, behind all that came before it.
type Journal interface {
	Depend(r stream.Record) stream.Position
}

// journal is the engine's own, for as long as there is no machine.
type journal struct {
	next  stream.Position
	ready *tcpwrap.Ready
}

func (j *journal) Depend(r stream.Record) stream.Position {
	p := j.next
	j.next++
	j.ready.Records = append(j.ready.Records, tcpwrap.Numbered{Pos: p, Record: r})
	return p
}

// taken is a record made of a client's segment that is not stable yet.
type taken struct {
	pos  stream.Position
	line *line
	ev   event
}

// absence is what the engine knows of a connection whose client it answers.
type absence struct {
	nxt     seqnum.Value // the log's edge, with what is not stable yet
	stable  seqnum.Value // of that, what the client may hear of
	offered seqnum.Value // right edge of the window it has been given
	fin     bool         // its FIN was taken
	reset   bool         // its reset was
	up      seqnum.Value // its newest urgent pointer, with urgent
	urgent  bool
	ts      uint32 // what our acknowledgements carry as TSval
	owed    bool   // an acknowledgement is due
	prompts int    // left to be sent
	met     bool   // it has been heard of
	told    bool   // the log has where it stands
}

// StandIn begins to answer clients in the place of their server. The records of
// what they send go into Ready.Records from next on, the first position of this
// node's epoch, and silence is for how long nobody has answered them.
func (e *Engine) StandIn(next stream.Position, silence time.Duration) {
	own := &journal{next, &e.Ready}
	e.journal, e.own = own, own
	e.long = silence >= longSilence
	for _, l := range e.lines {
		if l.left == nil {
			continue
		}
		l.away = l.left
		l.away.ts = l.kTS
		if e.long {
			l.away.prompts = promptsEach
		}
		if e.attends(l) { // else its client knows no connection yet
			e.tell(l)
		}
	}
}

// tell logs where a client stands when it is about to hear of this node: whoever
// takes over from here in the middle must not set the clock back behind the
// acknowledgements that this node sends (PAWS).
func (e *Engine) tell(l *line) {
	l.away.told = true
	s := l.state
	s.Conn, s.ClientAck, s.ClientEdge, s.ClientTS, s.ServerTS, s.ServerEdge = l.cut.Conn, l.ack, l.edge, l.clientTS, l.away.ts, l.away.offered
	s.ServerNxt = seqnum.Max(s.ServerNxt, l.ack)
	e.journal.Depend(s)
}

// longSilence is the outage beyond which clients' retransmission timers have
// backed off so far that they are asked to retransmit at once.
const longSilence = time.Second

// Next is the position of the next record; it is the machine's first at GoLive.
func (e *Engine) Next() stream.Position { return e.own.next }

// Succeed makes the engine's records the machine's from now on, at GoLive.
func (e *Engine) Succeed(j Journal) {
	if e.journal != nil {
		e.journal = j
	}
}

// Congested tells the engine whether the log lags so far behind that clients must
// wait with what they send.
func (e *Engine) Congested(yes bool) { e.congested = yes }

// Doubt tells the engine whether another node may be the primary: then clients
// hear nothing from here.
func (e *Engine) Doubt(yes bool) {
	e.doubt = yes
	e.settleDues()
}

// Stable is the log's notice that everything up to p is stable.
func (e *Engine) Stable(now time.Time, p stream.Position) {
	n := 0
	for ; n < len(e.taken) && e.taken[n].pos <= p; n++ {
		t := &e.taken[n]
		if t.line.gone {
			e.awayOctets -= len(t.ev.data)
			continue
		}
		if t.ev.kind != evUrgent {
			t.line.away.stable = seqnum.Max(t.line.away.stable, t.ev.end())
			t.line.away.owed = t.ev.kind != evReset
		}
		if e.fed {
			e.feedTaken(t)
		} else {
			e.ripe = append(e.ripe, *t)
		}
	}
	e.taken = slices.Delete(e.taken, 0, n)
	if n == 0 {
		return
	}
	e.settleDues()
	if e.fed {
		e.pump(now)
	}
}

// feedTaken is the turn of a stable record of this epoch.
func (e *Engine) feedTaken(t *taken) {
	e.awayOctets -= len(t.ev.data)
	if !t.line.gone {
		e.queue(t.line.cut.Conn, t.ev)
	}
}

// settleDues sends the acknowledgements that are due.
func (e *Engine) settleDues() {
	if e.doubt {
		return
	}
	for _, l := range e.lines {
		if l.away != nil && l.away.owed {
			e.answer(l)
		}
	}
}

// leave notes where the client of a connection whose server is gone stands with
// the log. Where the log has a gap, or says that the connection is over, nobody
// may answer for it.
func (l *line) leave(logged Instream, fin bool, offered seqnum.Value) {
	edge, ok := logged.from(l.logged)
	if !ok || l.ended {
		return
	}
	if logged.Fin {
		fin = true
	}
	l.left = &absence{nxt: edge, stable: edge, fin: fin, offered: seqnum.Max(offered, edge)}
}

// attends reports whether the engine answers a connection's client.
func (e *Engine) attends(l *line) bool {
	return l != nil && l.away != nil && e.journal != nil && (l.birth == nil || l.answered)
}

// attend takes a client's segment in the place of its server.
func (e *Engine) attend(l *line, id tcpwrap.PacketID, s *tcpwrap.Segment) {
	e.touch(l)
	e.Ready.Decide(id, tcpwrap.Drop)
	a := l.away
	switch {
	case a.reset:
	case s.Flags.Has(tcpwrap.SYN):
		e.answer(l) // a challenge (RFC 5961, 4.2)
	case s.Flags.Has(tcpwrap.RST):
		switch {
		case s.Seq == a.nxt || s.Seq == a.stable:
			a.reset = true
			e.log(l, stream.ClientReset{Conn: l.cut.Conn, Seq: s.Seq}, event{evReset, s.Seq, nil})
		case a.stable.Less(s.Seq) && s.Seq.Less(a.offered):
			e.answer(l) // a challenge (RFC 5961, 3.2)
		}
	case !s.Flags.Has(tcpwrap.ACK):
	default:
		e.attendData(l, s)
	}
}

func (e *Engine) attendData(l *line, s *tcpwrap.Segment) {
	a := l.away
	end := s.End()
	switch {
	case s.Len() == 0:
		switch {
		case a.nxt.Less(s.Seq): // it has sent more, which was lost
			e.answer(l)
			e.prompt(l, a.stable)
		case s.Seq.Less(a.nxt) || !a.met: // a keep-alive, a probe of a shut window, or the answer to our greeting
			e.answer(l)
			a.prompts = 0
		}
		a.met = true
	case a.nxt.Less(s.Seq): // ahead of its turn: a duplicate acknowledgement asks for what is missing
		e.answer(l)
	case end.LessEq(a.nxt):
		if end.LessEq(a.stable) { // else its acknowledgement is on its way
			e.answer(l)
		}
	default:
		e.take(l, s)
	}
}

// take logs what is new in a segment that is in order and within the window.
func (e *Engine) take(l *line, s *tcpwrap.Segment) {
	a := l.away
	data := s.Payload[min(int(s.Seq.To(a.nxt)), len(s.Payload)):]
	room := 0
	if a.nxt.Less(a.offered) {
		room = int(a.nxt.To(a.offered))
	}
	whole := len(data) <= room
	data = data[:min(len(data), room)]
	fin := s.Flags.Has(tcpwrap.FIN) && whole
	if a.fin || len(data) == 0 && !fin {
		e.answer(l) // a probe of a shut window
		return
	}
	if e.congested || e.awayOctets+len(data) > maxAway || e.fed && e.queued+len(data) > maxAway {
		e.stats.Refused++
		return
	}
	a.prompts = 0
	known := func(up seqnum.Value) bool { return a.urgent && a.nxt.Less(a.up) && up.LessEq(a.up) }
	if up, yes := s.Up(); yes && a.nxt.Less(up) && !known(up) {
		a.up, a.urgent = up, true
		e.log(l, stream.Urgent{Conn: l.cut.Conn, Up: up}, event{evUrgent, up, nil})
	}
	for len(data) > 0 {
		n := min(len(data), stream.MaxPayload)
		kept := append([]byte(nil), data[:n]...)
		e.awayOctets += n
		e.log(l, stream.Bytes{Conn: l.cut.Conn, Seq: a.nxt, Payload: kept}, event{evData, a.nxt, kept})
		a.nxt = a.nxt.Add(seqnum.Size(n))
		data = data[n:]
		e.stats.TakenBytes += uint64(n)
	}
	if fin {
		e.log(l, stream.ClientFin{Conn: l.cut.Conn, Seq: a.nxt}, event{evFin, a.nxt, nil})
		a.nxt, a.fin = a.nxt.Add(1), true
	}
}

func (e *Engine) log(l *line, r stream.Record, ev event) {
	e.taken = append(e.taken, taken{e.journal.Depend(r), l, ev})
}

// answer acknowledges what is stable, from where the client takes an
// acknowledgement, and offers what is left of the window it was given.
func (e *Engine) answer(l *line) {
	a := l.away
	if e.doubt {
		a.owed = true
		return
	}
	a.owed = false
	if !a.told {
		e.tell(l)
	}
	ts := a.ts
	if e.live { // what was kept for the client, and is older, has left
		ts = l.kTS
	}
	e.stats.Answered++
	e.Ready.Send(tcpwrap.Outgoing{
		Tuple: l.cut.Tuple, Seq: l.ack, Ack: a.stable, Flags: tcpwrap.ACK, Window: a.window(l.cut.RcvWScale),
		HasTS: l.cut.HasTS, TSVal: ts, TSEcr: l.clientTS,
	})
}

// window is what is left of the window the client was given.
func (a *absence) window(scale uint8) uint16 {
	if !a.stable.Less(a.offered) {
		return 0
	}
	return uint16(min(65535, uint32(a.stable.To(a.offered))>>scale))
}

// prompt makes a client retransmit at once what it has sent from seq on, however
// far its timeout has backed off: as many destination unreachables as there can
// be doublings (RFC 6069; Linux does not react to duplicate acknowledgements,
// with or without SACK or D-SACK blocks, nor to a window update, once its timer
// has fired). They are ignored where nothing is outstanding from seq on.
func (e *Engine) prompt(l *line, seq seqnum.Value) {
	if e.doubt {
		return
	}
	for ; l.away.prompts > 0; l.away.prompts-- {
		e.Ready.Send(tcpwrap.Outgoing{Tuple: l.cut.Tuple, Seq: seq, Unreachable: true})
	}
}
