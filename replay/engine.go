package replay

import (
	"fmt"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Bounds of a roll-forward.
const (
	// maxInjection is the most payload that one injected segment carries: large
	// ones are several times faster, and must leave room for the headers in 64 KiB.
	maxInjection = 32 << 10
	// firstCredit is how far a connection may be fed before its restored TCP has
	// shown a window.
	firstCredit = 16 << 10
	// stall is how long the head of the log may wait for a window before it is
	// probed; after stallTries its connection stops holding the others up.
	stall      = 15 * time.Millisecond
	stallTries = 2
	// patience is how long a connection that lags after go-live may be silent
	// where the old server spoke; then it is taken for one that went another way.
	patience = 30 * time.Second
	// endedPatience is how long after go-live the server may be silent on a
	// connection that has ended without ending it as well.
	endedPatience = 5 * time.Second
	// maxBirths is how many connections may be made before the server has been
	// idle, that is, has accepted them: an accept queue that is full drops them
	// without a word.
	maxBirths = 64
	// maxBackoff bounds the time between two probes of one connection: stall
	// doubled that often.
	maxBackoff = 4
	// resend is how many segments one retransmission repeats.
	resend = 64
	// maxQueued is how many octets may wait to be injected (Engine.Full).
	maxQueued = 256 << 20
	// maxHeld and maxHeldOctets bound the packets of clients that wait for go-live.
	maxHeld       = 8192
	maxHeldOctets = 64 << 20
)

// Survivor is a connection of the generation's image with all that the log
// says of where its client stands.
type Survivor struct {
	Cut   tcpwrap.Cut      // as in the image
	State stream.ConnState // newest in the log; zero when there is none
	Known bool             // State is set
	Ended bool             // it has ended since: what it made the server do has not
	TS    uint32           // the timestamp clock the image was restored with

	Digests []stream.OutDigest // the newest in the log, oldest first
	Logged  Instream           // what the log has of its client
	// Closing says that the server had closed it before the generation: its TCP
	// has been made again from Cut, in the state after the server's FIN. A FIN of
	// the client's is fed to it like any other.
	Closing bool
	// Expired says that it is no longer protected, for it was idle for too long:
	// it is Ended, and its client has not heard of that.
	Expired bool
}

// Engine rolls restored connections forward: it plays the client to the
// restored TCP (the patent's "spoofed" segments), swallows what the real client
// already has and keeps the rest until it may leave.
//
// Like tcpwrap.Machine it is a deterministic machine: events in, Ready out, not
// safe for concurrent use. The order of events is Start, then Feed in the log's
// order, Fed at the log's end, and Packet and Tick at any time; when Done, GoLive.
type Engine struct {
	Ready  tcpwrap.Ready
	Births []Birth // to be done after Ready, and then emptied by the caller: see Delivered

	// Dialled are connections to be translated from now on: before Ready, too, and
	// emptied as Births is.
	Dialled []tcpwrap.Translated
	redials []*redial // in the order of the old server's SYNs

	lines  []*line // in the order of the survivors
	conns  map[stream.FourTuple]*line
	byID   map[stream.ConnID]*line
	order  []*line // whose turn it is: one entry for each queued event
	unsure []*line // what Tick and Done have to look at: all that are not settled
	swept  bool    // no line was dropped since the last sweep
	doomed []Condemned
	behind []*line // lagging: no longer hold the others up
	queued int
	begun  bool // the restored TCP is there
	busy   bool // the restored server is at work
	born   int  // connections made, and urgent octets injected
	// settledIn of them were made before it was last idle: it has accepted those.
	settledIn int
	fed       bool
	live      bool

	headSince time.Time
	headTries int

	waiting       []Waiting // clients' packets, and the server's own SYNs
	waitingOctets int
	waitingSYNs   map[stream.FourTuple]seqnum.Value

	// While the server is away (away.go).
	journal    Journal // nil: clients are not answered
	own        *journal
	taken      []taken // not stable yet
	ripe       []taken // stable, and their turn comes when the log has been fed
	awayOctets int     // in taken and ripe
	long       bool    // clients have waited for long
	congested  bool
	doubt      bool

	stats Stats
}

// Waiting is a packet of a client, or a SYN of the server's own, that came before
// go-live.
type Waiting struct {
	ID      tcpwrap.PacketID
	Segment tcpwrap.Segment
}

// Stats count a roll-forward.
type Stats struct {
	Injected, InjectedBytes   uint64
	Swallowed, SwallowedBytes uint64
	HeardBytes                uint64 // octets that the restored server said for the first time
	Resent                    uint64
	Kept                      uint64 // output the client had not seen, kept for go-live
	Refused                   uint64 // client packets dropped for want of room
	Born                      uint64 // connections re-created
	Condemned                 uint64 // connections reset
	Divergences               uint64 // connections on which the restored server said something else
	TakenBytes                uint64 // octets of clients logged while the server was away
	Answered                  uint64 // acknowledgements sent meanwhile
}

type eventKind uint8

const (
	evData eventKind = iota
	evFin
	evReset
	evOpen
	evAnswer // the peer's SYN-ACK to a dial
	evHeard  // the peer of a dialled connection had acknowledged all up to seq
	evUrgent // seq is the urgent pointer
)

type event struct {
	kind eventKind
	seq  seqnum.Value
	data []byte
}

func (e *event) end() seqnum.Value {
	n := seqnum.Size(len(e.data))
	if e.kind == evFin {
		n++
	}
	return e.seq.Add(n)
}

// line is one connection on its way from the image to the present.
type line struct {
	cut tcpwrap.Cut

	todo []event // not injected yet
	sent []event // injected, not acknowledged by the restored TCP

	injNxt    seqnum.Value // next octet to inject
	logged    seqnum.Value // the log's edge
	finLogged bool
	reset     bool   // the client reset it
	resetSent bool   // and the restored TCP was told
	gap       string // why it cannot be brought to the present, if it cannot

	out  tcpwrap.Digest     // of what the restored server says
	said []stream.OutDigest // what the old one said, as far as it is still ahead of out

	ack  seqnum.Value // the real client's acknowledgement
	edge seqnum.Value // right edge of the real client's window
	told seqnum.Value // highest acknowledgement given to the restored TCP, or in the image

	kSeen  bool // the restored TCP has sent something
	kAck   seqnum.Value
	kEdge  seqnum.Value
	kNxt   seqnum.Value // highest it has sent, plus one
	kSure  seqnum.Value // of that, what it has sent since it was restored
	kFin   bool
	kReset bool
	kTS    uint32

	clientTS   uint32
	birth      *Birth // of a newborn; nil for what is in the image
	wanted     bool   // its birth was asked for
	wantedAt   time.Time
	born       bool
	pred       *line // had the same addresses before, and has ended
	answered   bool  // its client has acknowledged the SYN-ACK
	openQueued bool
	ended      bool // it is over: all its output is swallowed

	redial   *redial      // dialled after the generation
	heardSeq seqnum.Value // of a dialled connection: the newest evHeard
	up       seqnum.Value // urgent pointer, with urgent
	urgent   bool
	upBorn   int          // Engine.born when the urgent octet was injected
	serverUp seqnum.Value // newest of the restored TCP's, with serverUrgent

	serverUrgent bool

	state stream.ConnState // newest in the log
	left  *absence         // how the old server left its client; nil: unknown
	away  *absence         // the same once clients are answered in its place; nil: never

	lagging bool // no longer holds the others up
	unsure  bool // in Engine.unsure
	gone    bool // dropped
	expired bool // its end is still to be told

	clientFin bool // the client's FIN is in the cut, and TCP has to be given it
	moved     time.Time
	grew      time.Time // when it last made progress, probes apart
	probes    int
	asked     bool // a probe waits for its answer
	kept      []tcpwrap.PacketID
	keptEnd   seqnum.Value // end of what is kept
}

// NewEngine begins a roll-forward.
func NewEngine(survivors []Survivor) *Engine {
	e := &Engine{conns: map[stream.FourTuple]*line{}, byID: map[stream.ConnID]*line{}}
	for i := range survivors {
		s := &survivors[i]
		c := s.Cut
		fin := s.Closing && c.ClientFin
		if fin {
			c.RcvNxt, c.ClientFin = c.RcvNxt.Sub(1), false
		}
		l := &line{
			cut: c, injNxt: c.RcvNxt, logged: c.RcvNxt, finLogged: c.ClientFin,
			ack: c.SndUna, edge: c.SndUna.Add(c.SndWnd), told: c.SndUna,
			kAck: c.RcvNxt, kEdge: c.RcvNxt.Add(firstCredit), kNxt: c.SndNxt, kSure: c.SndUna, kFin: c.ServerFin,
			kTS: s.TS, clientTS: c.ClientTS, ended: s.Ended, heardSeq: c.SndUna,
		}
		l.expired = s.Expired
		l.compareWith(s.Digests)
		offered := c.RcvNxt.Add(c.RcvWnd)
		if s.Known {
			l.ack = seqnum.Max(l.ack, s.State.ClientAck)
			l.edge = seqnum.Max(l.edge, s.State.ClientEdge)
			l.heardTS(s.State.ClientTS)
			l.state = s.State
			offered = seqnum.Max(offered, s.State.ServerEdge)
		}
		if !c.Dialled { // a peer's answers have their place behind what they answer
			l.leave(s.Logged, c.ClientFin, offered)
		}
		if l.clientFin = fin; fin && l.left != nil { // the log need not have it any more
			l.left.nxt, l.left.fin = c.RcvNxt.Add(1), true
			l.left.stable = l.left.nxt
		}
		e.add(l)
	}
	return e
}

func (e *Engine) add(l *line) {
	e.lines = append(e.lines, l)
	e.conns[l.cut.Tuple] = l
	e.byID[l.cut.Conn] = l
	e.touch(l)
}

// touch has Tick look at a line again: something about it has changed. There may
// be thousands to which nothing happens, and Tick comes every millisecond.
func (e *Engine) touch(l *line) {
	if !l.unsure {
		l.unsure = true
		e.unsure = append(e.unsure, l)
	}
}

// settle forgets the lines to which nothing can happen before they are touched.
func (e *Engine) settle() {
	e.unsure = slices.DeleteFunc(e.unsure, func(l *line) bool {
		l.unsure = !l.gone && !l.settled()
		return !l.unsure
	})
}

// Start tells every restored TCP what its client has acknowledged and offers.
func (e *Engine) Start(now time.Time) {
	e.headSince = now
	e.begun = true
	for _, l := range e.lines {
		l.moved, l.grew = now, now
		if l.birth == nil {
			e.acknowledge(l)
		}
		if l.clientFin {
			e.queue(l.cut.Conn, event{evFin, l.logged, nil})
		}
	}
	e.pump(now)
}

// Feed takes the log's next record. Records of connections that are not
// survivors and octets that are in the image are left out.
func (e *Engine) Feed(now time.Time, r stream.Record) {
	switch r := r.(type) {
	case stream.ConnOpen:
		e.opened(r.Conn)
	case stream.Bytes:
		e.queue(r.Conn, event{evData, r.Seq, r.Payload})
	case stream.ClientFin:
		e.queue(r.Conn, event{evFin, r.Seq, nil})
	case stream.ClientReset:
		e.dialAnswered(r.Conn, event{kind: evReset, seq: r.Seq})
		e.queue(r.Conn, event{evReset, r.Seq, nil})
	case stream.ConnState:
		e.heardThen(r)
	case stream.Urgent:
		e.queue(r.Conn, event{evUrgent, r.Up, nil})
	case stream.ConnAnswer:
		e.dialAnswered(r.Conn, event{kind: evAnswer, seq: r.ISN})
	}
	e.pump(now)
}

func (e *Engine) queue(id stream.ConnID, ev event) {
	l := e.byID[id]
	if l == nil || l.reset || l.gap != "" || l.unborn() && !l.openQueued && !l.wanted {
		return
	}
	switch ev.kind {
	case evReset:
		l.reset = true
	case evUrgent:
		if ev.seq.LessEq(l.logged) || l.finLogged { // the image has it
			return
		}
	default:
		end := ev.end()
		if end.LessEq(l.logged) || l.finLogged {
			return
		}
		if l.logged.Less(ev.seq) { // what comes now must not take the place of what is missing
			e.touch(l)
			l.gap = fmt.Sprintf("the log lacks %d octets from %d on", l.logged.To(ev.seq), l.logged)
			return
		}
		if ev.seq.Less(l.logged) {
			ev.data = ev.data[ev.seq.To(l.logged):]
			ev.seq = l.logged
		}
		l.logged = end
		l.finLogged = l.finLogged || ev.kind == evFin
	}
	l.todo = append(l.todo, ev)
	e.queued += len(ev.data)
	e.touch(l)
	if !l.lagging {
		e.order = append(e.order, l)
	}
}

// Busy tells the engine whether the restored server is at work or waits for
// something to happen. While it is at work nothing stands still, however long it
// takes on a loaded host, and a connection whose window is shut is waited for:
// letting others overtake it is for when nothing else helps. born is what Born
// answered before the server was looked at.
func (e *Engine) Busy(yes bool, born int) {
	e.busy = yes
	if !yes {
		e.settledIn = born
	}
}

// Born is how many connections were made and urgent octets injected so far: what
// the server has to see to before there may be more of it.
func (e *Engine) Born() int { return e.born }

// Full says that enough waits to be injected; feed on when it no longer is.
func (e *Engine) Full() bool { return e.queued > maxQueued }

// Fed says that the log has ended.
func (e *Engine) Fed(now time.Time) {
	e.fed = true
	for i := range e.ripe {
		e.feedTaken(&e.ripe[i])
	}
	e.ripe = nil
	for _, l := range e.lines {
		if l.cut.Urgent && l.ack.Less(l.cut.ServerUp) && !l.gone {
			e.doom(l, "the image has urgent data that the server sent, but not where it is: no image has")
		}
	}
	e.sweep()
	e.pump(now)
	for _, l := range e.lines {
		e.hurry(l)
	}
}

// Packet is a caught packet: outbound ones come from the restored TCP, inbound
// ones from the real clients. It answers false, after GoLive, when the packet is
// the affair of the machine that protects the others: news for the client of a
// connection that lags, because the server may have made it of what that
// machine's log does not have yet, and what begins a connection anew.
func (e *Engine) Packet(now time.Time, id tcpwrap.PacketID, s *tcpwrap.Segment) (judged bool) {
	if s.Dir == tcpwrap.Inbound {
		return e.fromClient(now, id, s)
	}
	l := e.there(s.Tuple)
	if l == nil {
		return e.unknown(now, id, s)
	}
	judged = e.fromServer(now, l, id, s)
	e.pump(now)
	return judged
}

// fromClient keeps a real client's packet for go-live and takes from it what
// it says about the outstream: it is newer than anything the log has.
func (e *Engine) fromClient(now time.Time, id tcpwrap.PacketID, s *tcpwrap.Segment) (judged bool) {
	l := e.conns[s.Tuple]
	if l != nil && l.unborn() && e.answeredNow(l, s) {
		l = nil
	}
	if e.live && l == nil {
		return false
	}
	if l != nil && s.Flags.Has(tcpwrap.ACK) && s.Flags&(tcpwrap.RST|tcpwrap.SYN) == 0 {
		e.heard(l, s)
	}
	if e.attends(l) {
		e.attend(l, id, s)
		if e.live {
			e.acknowledge(l)
		}
		return true
	}
	if e.live && l != nil { // lagging: its octets would overtake those of the log
		e.Ready.Decide(id, tcpwrap.Drop)
		if s.Flags.Has(tcpwrap.RST) && s.Seq == l.logged {
			e.queue(l.cut.Conn, event{evReset, s.Seq, nil})
			e.pump(now)
			return true
		}
		e.acknowledge(l)
		return true
	}
	e.keep(id, s)
	return true
}

// keep keeps a packet for the machine that takes over at go-live.
func (e *Engine) keep(id tcpwrap.PacketID, s *tcpwrap.Segment) {
	if s.Flags.Has(tcpwrap.SYN) { // it is answered at go-live, once, however often it comes
		if isn, yes := e.waitingSYNs[s.Tuple]; yes && isn == s.Seq {
			e.Ready.Decide(id, tcpwrap.Drop)
			return
		}
	}
	n := len(s.Payload) + len(s.RawOptions)
	if len(e.waiting) >= maxHeld || e.waitingOctets+n > maxHeldOctets {
		e.stats.Refused++
		e.Ready.Decide(id, tcpwrap.Drop)
		return
	}
	w := Waiting{id, *s}
	w.Segment.Payload = append([]byte(nil), s.Payload...)
	w.Segment.RawOptions = append([]byte(nil), s.RawOptions...)
	if s.Flags.Has(tcpwrap.SYN) {
		if e.waitingSYNs == nil {
			e.waitingSYNs = map[stream.FourTuple]seqnum.Value{}
		}
		e.waitingSYNs[s.Tuple] = s.Seq
	}
	e.waiting = append(e.waiting, w)
	e.waitingOctets += n
}

// heard takes note of an acknowledgement. One that covers output which the
// restored server has not made again yet is believed: the client cannot have
// it from anyone but the old primary.
func (e *Engine) heard(l *line, s *tcpwrap.Segment) {
	e.touch(l)
	moved := l.ack.Less(s.Ack)
	l.ack = seqnum.Max(l.ack, s.Ack)
	l.edge = seqnum.Max(l.edge, s.Ack.Add(seqnum.Size(s.Window)<<l.cut.SndWScale))
	if s.Options.HasTS {
		l.heardTS(s.Options.TSVal)
	}
	if moved && !e.live && !l.unborn() {
		e.acknowledge(l)
	}
}

// heardTS takes the later of two timestamps: one that goes back makes the
// restored TCP discard all we send (PAWS, RFC 7323, 5). 0 is none.
func (l *line) heardTS(v uint32) {
	if v != 0 && (l.clientTS == 0 || seqnum.Value(l.clientTS).Less(seqnum.Value(v))) {
		l.clientTS = v
	}
}

func (e *Engine) fromServer(now time.Time, l *line, id tcpwrap.PacketID, s *tcpwrap.Segment) (judged bool) {
	e.touch(l)
	if l.redial != nil && s.Flags.Has(tcpwrap.SYN) {
		e.synAgain(l, id)
		return true
	}
	if s.Options.HasTS {
		l.kTS = s.Options.TSVal
	}
	end := s.End()
	if s.Flags.Has(tcpwrap.RST) && l.birth != nil && !l.kSeen { // no such connection yet: Tick has it made again
		e.Ready.Decide(id, tcpwrap.Drop)
		return true
	}
	if l.ended { // nobody is there to have it
		l.ack = seqnum.Max(l.ack, end)
		l.edge = l.ack.Add(65535 << l.cut.SndWScale)
	}
	if s.Flags.Has(tcpwrap.ACK) {
		e.acked(now, l, s)
	}
	probe := s.Len() == 0 && s.Seq.Less(l.kSure) // keep-alive or of a shut window: it wants an answer
	e.compare(l, s)
	if l.kNxt.Less(end) {
		e.stats.HeardBytes += uint64(l.kNxt.To(end))
		l.kNxt, l.grew = end, now
	}
	l.kSure = seqnum.Max(l.kSure, end)
	if up, urgent := s.Up(); urgent {
		l.serverUp, l.serverUrgent = up, true
	}
	l.kFin = l.kFin || s.Flags.Has(tcpwrap.FIN)
	// The first is the connection's; the next ones answer what was on its way.
	reset := s.Flags.Has(tcpwrap.RST) && !l.kReset
	l.kReset = l.kReset || reset
	news := (reset || s.Len() > 0 && l.ack.Less(end)) && !l.ended
	switch {
	case e.live && !l.ended && (news || s.Len() == 0 && !probe):
		return false
	case news && (reset || len(l.kept) == 0 || l.keptEnd.Less(end)):
		// The client has not seen it, or not all of it: it leaves at go-live.
		e.stats.Kept++
		if len(l.kept) == 0 || l.keptEnd.Less(end) {
			l.keptEnd = end
		}
		l.kept = append(l.kept, id)
		if s.Seq.Less(l.ack) {
			e.acknowledge(l)
		}
	default: // what the client has, what is kept already, or nothing but an acknowledgement
		e.Ready.Decide(id, tcpwrap.Drop)
		if s.Len() > 0 {
			e.stats.Swallowed++
			e.stats.SwallowedBytes += uint64(len(s.Payload))
		}
		if s.Len() > 0 || probe {
			e.acknowledge(l)
		}
	}
	return true
}

// acked takes the restored TCP's acknowledgement and window. The latest window
// counts, not the largest: the first probe after a restore may offer far too
// much.
func (e *Engine) acked(now time.Time, l *line, s *tcpwrap.Segment) {
	l.kSeen = true
	l.kEdge = s.Ack.Add(seqnum.Size(s.Window) << l.cut.RcvWScale)
	if l.kAck.Less(s.Ack) {
		l.kAck, l.moved, l.grew, l.probes = s.Ack, now, now, 0
		n := 0
		for n < len(l.sent) && l.sent[n].end().LessEq(l.kAck) {
			n++
		}
		clear(l.sent[:n])
		l.sent = l.sent[n:]
	}
	if l.asked && len(l.sent) > 0 {
		e.resend(l)
	}
	l.asked = false
}
