package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

const resetState = tcptest.Reset

// takeStage is how far a takeover has come: internal/node's standby.takeOver.
type takeStage uint8

const (
	takeClaim   takeStage = iota // the fence
	takeRead                     // the log up to the fence
	takeDrain                    // an attempt has failed: what clients have sent meanwhile is to be stable
	takeRestore                  // CRIU is at work
	takeReplay
)

// takeover is one under way.
type takeover struct {
	n     *node
	stage takeStage
	until time.Time        // the fence has to be ours by then
	upTo  stream.StreamSeq // of the log, what has to be replayed

	// The claim, and what it waits for.
	claim  *stream.Claim
	conn   *logConn
	asked  askKind
	fence  stream.Fence // to be appended
	waits  bool
	answer time.Time // when that is given up
	retry  time.Time

	ledger     *replay.Ledger
	candidates []*local
	now        *local // the one tried
	lastTry    bool   // the newest one was brought here after all
	restoredAt time.Time
	entries    []stream.Entry
	fed        int
	over       bool // the log's end was told
	reborn     map[stream.ConnID]bool
	gone       []replay.Condemned
	progress   replay.Stats
	moved      time.Time
}

func (n *node) beginTakeover() {
	n.role = taking
	n.w.takes++
	var nonce [16]byte
	binary.BigEndian.PutUint64(nonce[:], n.w.takes)
	binary.BigEndian.PutUint64(nonce[8:], uint64(n.num)+1)
	n.take = &takeover{n: n, until: n.w.now.Add(fenceTime), claim: stream.NewClaim(n.name, n.ledger.Fence.Seq, nonce), retry: n.w.now}
	for _, c := range []*local{n.newest, n.before} {
		if c != nil {
			n.take.candidates = append(n.take.candidates, c)
		}
	}
}

func (t *takeover) lost() {
	if t.conn != nil {
		t.conn.closed = true
	}
	t.conn, t.waits = nil, false
	t.retry = t.n.w.now.Add(time.Duration(t.n.w.d.between(1, 20)) * time.Millisecond)
}

func (t *takeover) ask(a ask) {
	t.conn.up = append(t.conn.up, a)
	t.asked, t.waits, t.answer = a.kind, true, t.n.w.now.Add(apiTimeout)
}

// answered is the claim's next step: stream.attempt.
func (t *takeover) answered(r *answer) {
	if !t.waits || r.kind != t.asked {
		return
	}
	t.waits = false
	n, now := t.n, t.n.w.now
	switch r.kind {
	case askNewestFence:
		f, stored, err := t.claim.Newest(*r.msg.fence, now)
		switch {
		case err != nil:
			n.w.say("%s: %v", n.name, err)
			n.standAgain()
		case stored:
			t.look()
		default:
			t.fence = f
			t.ask(ask{kind: askFence, fence: f})
		}
	case askFence:
		if r.err != nil { // a race: the next reading tells
			t.retry = now.Add(time.Duration(n.w.d.between(1, 20)) * time.Millisecond)
			return
		}
		t.claim.Stored(t.fence, r.seq)
		t.look()
	case askMessage:
		seq, fence := t.claim.Look()
		switch {
		case !r.there: // the server lags behind
			t.lost()
		case fence && r.msg.fence == nil || !fence && r.msg.fence != nil:
			n.w.violate(3, "message %d is not what the claim of %s takes it for", seq, n.name)
		case fence:
			t.claim.TookFence(*r.msg.fence)
			t.look()
		default:
			last, found, err := t.claim.TookBatch(r.msg.data)
			if err != nil {
				n.w.violate(3, "the claim of %s: %v", n.name, err)
			}
			if found {
				n.fenced(last, seq)
				return
			}
			t.look()
		}
	}
}

func (t *takeover) look() {
	seq, _ := t.claim.Look()
	if seq == 0 {
		t.n.fenced(0, 0)
		return
	}
	t.ask(ask{kind: askMessage, seq: seq})
}

// standAgain: another node is the primary, as far as can be told.
func (n *node) standAgain() {
	if n.take.conn != nil {
		n.take.conn.closed = true
	}
	n.take, n.role = nil, standby
}

// fenced: this node holds the newest epoch.
func (n *node) fenced(stable stream.Position, newest stream.StreamSeq) {
	t := n.take
	f := t.claim.Fence()
	n.epoch = f.Epoch
	n.log = &logLink{core: stream.NewCore(f, stable, newest, ackTime, maxBacklog, n.w.now), conn: t.conn}
	t.conn.claiming = false
	n.first, t.upTo = stable+1, f.Seq
	t.stage = takeRead
	t.until = n.w.now.Add(fenceTime)
	n.w.say("%s: has fenced the primary, epoch %d, behind position %d", n.name, f.Epoch, stable)
	if n.w.truth.owner == n && stable != n.w.truth.last {
		n.w.violate(3, "%s begins epoch %d behind position %d; the log ends at %d", n.name, f.Epoch, stable, n.w.truth.last)
	}
}

// takeOn goes on with a takeover; it is called every few milliseconds.
func (n *node) takeOn() {
	t := n.take
	now := n.w.now
	switch t.stage {
	case takeClaim:
		if now.After(t.until) {
			n.w.say("%s: cannot fence the primary", n.name)
			n.standAgain()
			return
		}
		if t.waits && !now.Before(t.answer) {
			t.lost()
		}
		if t.waits || now.Before(t.retry) || !n.logAnswers() {
			return
		}
		if t.conn == nil {
			t.conn = n.w.log.connect(n, true)
		}
		t.ask(ask{kind: askNewestFence})
	case takeRead:
		if f := n.ledger.Fence; f.Seq > t.claim.Fence().Seq {
			n.w.say("%s: %s was faster", n.name, f.Node)
			n.leaveHost()
		} else if n.ledger.LastSeq >= t.claim.Fence().Seq {
			t.ledger = n.ledger
			n.plan()
		} else if now.After(t.until) {
			n.fails(errors.New("read the log up to the fence"))
		}
	case takeDrain:
		switch core := n.log.core; {
		case core.Stable() == core.Next()-1:
			if last := core.Stable(); last >= n.first {
				t.upTo, _ = core.SeqOf(last)
			}
			n.plan()
		case now.After(t.until):
			t.candidates = nil
			n.fails(errors.New("wait for what clients have sent meanwhile"))
		}
	case takeRestore:
		if !now.Before(t.restoredAt) {
			n.restore()
		}
	case takeReplay:
		n.rollForward()
	}
}

// fails is the end of a takeover that cannot go on.
func (n *node) fails(err error) {
	n.w.say("%s: take over: %v", n.name, err)
	t := n.take
	// The store has the newest generation still, if it was not brought here in time.
	if g := n.w.manifests[n.ledger.Gen.Manifest]; len(t.candidates) == 0 && !t.lastTry && g != nil && g.complete(&n.w.store) {
		t.lastTry = true
		t.candidates = append(t.candidates, &local{g, n.ledger.GenAt})
	}
	if len(t.candidates) > 0 && t.stage > takeRead {
		n.clear()
		n.engine, n.serving = nil, false
		t.stage, t.until = takeDrain, n.w.now.Add(fenceTime)
		return
	}
	n.leaveHost()
	n.role = broken
	if n.w.epochOf(n) {
		n.w.violate(6, "%s cannot take over: %v", n.name, err)
	}
}

// plan finds out where each connection of the image stands now.
func (n *node) plan() {
	t := n.take
	t.now, t.candidates = t.candidates[0], t.candidates[1:]
	if t.stage > takeRead { // a second one, with its longer log
		l := replay.NewLedger()
		if err := n.entries(t.now.g, func(e stream.Entry) { l.Apply(n.w.now, e) }); err != nil {
			n.fails(fmt.Errorf("read the log from generation %d on: %w", t.now.g.rec.ID, err))
			return
		}
		l.Introduce(t.now.g.rec, t.now.g.tuples())
		l.SeenAsIn(n.ledger)
		t.ledger = l
	}
	g := t.now.g
	now := n.w.now
	clock := func(ts uint32, seen time.Time) uint32 { return ts + uint32(now.Sub(seen).Milliseconds()) }
	var survivors []replay.Survivor
	for _, c := range g.cuts {
		sv := replay.Survivor{Cut: c}
		ts := clock(c.ServerTS, g.dumped)
		if ln := t.ledger.Line(c.Conn); ln != nil {
			sv.Ended, sv.Digests, sv.Logged = ln.Ended, ln.Digests, ln.Logged
			if ln.Known {
				sv.State, sv.Known = ln.State, true
				if ln.State.ServerTS != 0 {
					ts = laterOf(ts, clock(ln.State.ServerTS, ln.StateAt))
				}
			}
		}
		if c.HasTS {
			sv.TS = ts + clockMargin
		}
		survivors = append(survivors, sv)
	}
	waited := map[stream.ConnID]bool{}
	for _, id := range g.unaccepted {
		waited[id] = true
	}
	newborns := t.ledger.Newborns(g.rec.Cut, waited, func(ts uint32, seen time.Time) uint32 { return clock(ts, seen) + clockMargin })
	n.engine = replay.NewEngine(survivors)
	t.reborn = n.engine.AddNewborns(newborns)
	n.vip, n.w.route, n.announced = true, n.num, now
	n.w.say("%s: takes the address; generation %d, %d connections and %d younger ones", n.name, g.rec.ID, len(survivors), len(newborns))
	silence := n.w.now.Sub(n.judge.HeardAt())
	n.engine.StandIn(n.log.core.Next(), silence)
	n.engine.Greet()
	n.carryOut()
	t.stage = takeRestore
	t.restoredAt = now.Add(time.Duration(n.w.d.between(1, 30)) * time.Millisecond)
	n.survivors = survivors
}

// entries reads the log from a generation on up to our fence.
func (n *node) entries(g *generation, each func(stream.Entry)) error {
	from := max(g.rec.FromSeq, 1)
	_, err := n.w.log.read(stream.NewFollow(n.w.log.epochAt(from)), from, from > 1, n.take.upTo, each)
	return err
}

func (n *node) restore() {
	t := n.take
	if len(t.candidates) > 0 && n.w.d.chance(n.w.setup.BadImages) {
		n.fails(fmt.Errorf("restore generation %d", t.now.g.rec.ID))
		return
	}
	if !n.logAnswers() {
		return // it is read below; the real reader waits, too
	}
	t.entries, t.fed, t.over = nil, 0, false
	err := n.entries(t.now.g, func(e stream.Entry) { t.entries = append(t.entries, e) })
	n.restoreFrom(t.now.g, n.survivors)
	n.engine.Start(n.w.now)
	n.carryOut()
	n.wake()
	t.stage, t.moved = takeReplay, n.w.now
	if err != nil {
		n.fails(fmt.Errorf("replay the log from %d: %w", t.now.g.rec.FromSeq, err))
	}
}

// rollForward feeds the log and waits until every connection has come as far as
// its client.
func (n *node) rollForward() {
	t, w := n.take, n.w
	for range 6 {
		for _, tuple := range n.order {
			n.serve(tuple)
		}
	}
	for k := 0; t.fed < len(t.entries) && (w.calm || k < 6) && !n.engine.Full(); t.fed++ {
		if e := t.entries[t.fed]; e.Rec != nil && e.Pos >= t.now.g.rec.From {
			n.engine.Feed(w.now, e.Rec)
			n.carryOut()
			k++
		}
	}
	if t.fed < len(t.entries) {
		t.moved = w.now
		return
	}
	if !t.over {
		t.over = true
		n.engine.Fed(w.now)
		n.carryOut()
	}
	st := n.engine.Stats()
	st.Resent = 0
	if st != t.progress {
		t.progress, t.moved = st, w.now
	}
	switch {
	case n.engine.Done():
		t.gone = n.engine.Condemned()
	case w.now.Sub(t.moved) > quietTime:
		t.gone = append(n.engine.Condemned(), n.engine.Condemn()...)
		n.carryOut()
	default:
		return
	}
	n.goLive()
}

func (n *node) goLive() {
	t, w := n.take, n.w
	g := t.now.g
	for _, c := range t.gone {
		// A client that is gone may have left packets of an earlier connection behind,
		// which say that it has what this one never said.
		cl := w.clientOf(c.Tuple)
		if cl.told = true; !cl.gone && !cl.finished() {
			w.violate(6, "%s gives client %d up: %s", n.name, cl.name, c.Why)
		}
	}
	if d := n.engine.Stats().Divergences; d > 0 {
		w.violate(6, "%s: %d divergences of a server that does what it did", n.name, d)
	}
	survives := map[stream.ConnID]bool{}
	for i := range g.cuts {
		survives[g.cuts[i].Conn] = true
	}
	next := g.nextConn
	t.ledger.Lines(func(l *replay.Line) { next = max(next, l.Conn+1) })
	orphans := t.ledger.Orphans(func(id stream.ConnID) bool { return survives[id] || t.reborn[id] })
	for _, o := range orphans {
		c := w.clientOf(o.Tuple)
		if c.told = true; !c.gone && !c.ep.Over() && !c.finished() {
			w.violate(6, "%s: connection %d of client %d is lost", n.name, o.Conn, c.name)
		}
	}
	late := t.ledger.TimeWait(w.now)
	cuts, waiting := n.engine.GoLive()
	m := tcpwrap.NewMachine(n.engine.Next(), next, tcpwrap.DefaultLimits())
	m.StableSoFar(n.log.core.Stable())
	n.engine.Succeed(m)
	n.machine = m
	m.Append(stream.Hello{})
	m.Adopt(cuts)
	m.Linger(late)
	n.kept, n.lastID = []*generation{g}, t.ledger.Gen.ID
	n.known, n.trusted, n.proven = nil, n.keptByAll(g, t.ledger.Gen), false
	n.take, n.role = nil, primary
	if w.epochOf(n) {
		w.truth.lives(g)
	}
	n.w.say("%s: live, epoch %d, %d connections", n.name, n.epoch, len(cuts))
	for i := range waiting {
		m.Packet(w.now, waiting[i].ID, &waiting[i].Segment, false)
	}
	for _, c := range t.gone {
		m.Append(stream.ConnEnd{Conn: c.Conn, Reason: stream.EndReset})
	}
	for _, o := range orphans {
		m.Append(stream.ConnEnd{Conn: o.Conn, Reason: stream.EndReset})
		for _, at := range o.At {
			m.Ready.Send(tcpwrap.Outgoing{Tuple: o.Tuple, Seq: at, Flags: tcpwrap.RST})
		}
	}
	n.carryOut()
}

// keptByAll are the chunks that every earlier primary keeps, stopped and gone on as
// it may be.
func (n *node) keptByAll(restored *generation, newest stream.Generation) map[stream.Hash]bool {
	g := n.w.manifests[newest.Manifest]
	gens := []stream.Generation{g.rec}
	if restored.rec.ID+1 == newest.ID {
		gens = append(gens, restored.rec)
	}
	live, _ := checkpoint.Live(gens, map[stream.Hash]checkpoint.Manifest{
		g.rec.Manifest: g.manifest(), restored.rec.Manifest: restored.manifest(),
	})
	return live
}

// epochOf reports whether n holds the newest epoch.
func (w *World) epochOf(n *node) bool { return w.truth.epoch == n.epoch && w.truth.owner == n }
