package replay_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// dying is how seldom a takeover dies in the middle.
const dying = 8

// clockMargin is the node's: how far a restored timestamp clock is set ahead.
const clockMargin = 100

// step lets one thing happen, whatever the state of the service.
func (w *world) step() {
	w.now = w.now.Add(time.Duration(w.between(0, 6)) * time.Millisecond)
	what := w.between(0, 99)
	switch {
	case what < 28:
		w.speakUp(w.clients[w.between(0, len(w.clients)-1)])
	case what < 48:
		w.deliver(&w.toServer, false, w.toServerNow)
	case what < 65:
		w.deliver(&w.toClient, false, w.toClientNow)
	case what < 85:
		if len(w.order) > 0 {
			w.serve(w.order[w.between(0, len(w.order)-1)])
		}
	case what < 93:
		if w.machine != nil || w.engine != nil {
			w.stabilize(stream.Position(w.between(int(w.stable), len(w.log))))
		}
	case what < 98:
		w.tick()
	case what < 99:
		w.follow(int(w.stable))
	default:
		if w.machine != nil {
			w.machine.Congested(w.chance(3))
		}
		if w.engine != nil {
			w.engine.Congested(w.chance(3))
			w.engine.Doubt(w.chance(3))
			w.carryOut()
		}
	}
}

// tick is what the node does every few milliseconds.
func (w *world) tick() {
	if w.engine != nil && !w.frozen {
		w.engine.Busy(w.chance(4), w.engine.Born())
		w.engine.Tick(w.now)
		w.carryOut()
		if w.machine != nil {
			if cuts := w.engine.Joined(); len(cuts) > 0 {
				w.t.Logf("joined %+v", cuts)
				w.machine.Adopt(cuts)
			}
			w.carryOut()
			if w.engine.Remaining() == 0 {
				w.engine = nil
			}
		}
	}
	if w.machine != nil {
		w.machine.Tick()
		w.carryOut()
	}
}

func (w *world) steps(label string, most int) {
	if !rapid.Bool().Draw(w.t, label) {
		return
	}
	for range w.between(0, most*10) {
		w.step()
	}
}

// crash ends the host: what is not in the log is lost.
func (w *world) crash() {
	kept := w.between(int(w.stable), len(w.log))
	w.t.Logf("crash: %d of %d records are kept", kept, len(w.log))
	w.log = w.log[:kept]
	for len(w.gens) > 0 && w.gens[len(w.gens)-1].pos > stream.Position(kept) {
		w.gens = w.gens[:len(w.gens)-1]
	}
	w.machine, w.engine, w.frozen = nil, nil, false
	w.host, w.order = map[stream.FourTuple]*served{}, nil
	w.waits = map[tcpwrap.PacketID]*caught{}
	w.dep, w.stable = stream.Position(kept), stream.Position(kept)
	w.follow(kept)
	w.now = w.now.Add(time.Duration(w.between(0, 2000)) * time.Millisecond)
}

// takeover is what the standby's node does, with the world going on meanwhile.
func (w *world) takeover() {
	g, fence := w.gens[len(w.gens)-1], len(w.log)
	var survivors []replay.Survivor
	planned := w.now
	for _, c := range g.cuts {
		sv := replay.Survivor{Cut: c}
		ts := c.ServerTS + uint32(planned.Sub(g.at).Milliseconds())
		if ln := w.ledger.Line(c.Conn); ln != nil {
			sv.Ended, sv.Digests, sv.Logged = ln.Ended, ln.Digests, ln.Logged
			if ln.Known {
				sv.State, sv.Known = ln.State, true
				if ln.State.ServerTS != 0 {
					seen := ln.State.ServerTS + uint32(planned.Sub(ln.StateAt).Milliseconds())
					ts = uint32(seqnum.Max(seqnum.Value(ts), seqnum.Value(seen)))
				}
			}
		}
		if c.HasTS {
			sv.TS = ts + clockMargin
		}
		survivors = append(survivors, sv)
	}
	newborns := w.ledger.Newborns(g.rec.Cut, g.unaccepted, func(ts uint32, seen time.Time) uint32 {
		return ts + uint32(planned.Sub(seen).Milliseconds()) + clockMargin
	})
	w.engine = replay.NewEngine(survivors)
	reborn := w.engine.AddNewborns(newborns)
	w.silent = true
	w.steps("before the greeting", 2)
	w.engine.StandIn(stream.Position(len(w.log)+1), time.Duration(w.between(0, 1))*time.Hour)
	w.engine.Greet()
	w.carryOut()
	w.steps("before the restore", 8)
	if w.chance(dying) { // this node dies, too, and another one begins with the same generation
		w.crash()
		w.takeover()
		return
	}

	rewound, boast := w.chance(3), w.chance(3)
	w.boasted = w.boasted || boast
	restored := w.now
	for i, s := range g.socks {
		ts := survivors[i].TS
		h := s.copy(func() uint32 { return ts + uint32(w.now.Sub(restored).Milliseconds()) }, rewound, boast)
		h.ep.Overrun = w.overrun
		w.host[h.ep.Tuple] = h
		w.order = append(w.order, h.ep.Tuple)
	}
	w.engine.Start(w.now)
	w.carryOut()
	for _, t := range w.order { // the kernel's window probe at the end of repair mode
		w.host[t].ep.Probe()
		w.speak(w.host[t])
	}
	for p := int(g.rec.From); p <= fence; p++ {
		w.engine.Feed(w.now, w.log[p-1])
		w.carryOut()
		if w.chance(2) {
			w.step()
		}
	}
	w.engine.Fed(w.now)
	w.carryOut()
	var condemned []replay.Condemned
	for i := 0; !w.engine.Done(); i++ {
		if i == 1000 {
			w.slow = 1 // a server that does nothing for so long has gone another way
		}
		if i > 3000 { // the node does not wait for ever either
			condemned = w.engine.Condemn()
			w.carryOut()
			break
		}
		w.step()
		w.tick()
		w.now = w.now.Add(2 * time.Millisecond)
	}
	// A client that is gone may have left packets of an earlier connection behind,
	// which say that it has what this one never said.
	for _, c := range append(condemned, w.engine.Condemned()...) {
		if !w.clientOf(c.Tuple).gone {
			w.t.Fatalf("condemned %s: %s%s", c.Tuple, c.Why, w)
		}
	}
	if n := w.engine.Stats().Divergences; n > 0 {
		w.t.Fatalf("%d divergences of a server that does what it did", n)
	}
	w.goLive(g, reborn)
}

func (w *world) goLive(g *generation, reborn map[stream.ConnID]bool) {
	survives := map[stream.ConnID]bool{}
	for _, c := range g.cuts {
		survives[c.Conn] = true
	}
	next := g.nextConn
	w.ledger.Lines(func(l *replay.Line) { next = max(next, l.Conn+1) })
	orphans := w.ledger.Orphans(func(id stream.ConnID) bool { return survives[id] || reborn[id] })
	for _, o := range orphans {
		c := w.clientOf(o.Tuple)
		w.t.Logf("orphan: %+v", o)
		if !c.gone && !c.ep.Over() {
			w.t.Fatalf("connection %d of client %d is lost", o.Conn, c.name)
		}
		c.told = true
	}
	w.t.Log("live")
	w.silent = false
	cuts, waiting := w.engine.GoLive()
	w.t.Logf("cuts %+v", cuts)
	m := tcpwrap.NewMachine(w.engine.Next(), next, tcpwrap.DefaultLimits())
	m.StableSoFar(w.stable)
	w.engine.Succeed(m)
	w.machine = m
	m.Append(stream.Hello{})
	m.Adopt(cuts)
	m.Linger(w.ledger.TimeWait(w.now))
	w.perform(&w.engine.Ready, true)
	for i := range waiting {
		m.Packet(w.now, waiting[i].ID, &waiting[i].Segment, false)
	}
	for _, o := range orphans {
		for _, at := range o.At {
			m.Ready.Send(tcpwrap.Outgoing{Tuple: o.Tuple, Seq: at, Flags: tcpwrap.RST})
		}
	}
	w.carryOut()
}

// finish lets every conversation come to its end, on a network without faults.
func (w *world) finish() {
	w.overruns, w.slow, w.lazy = 0, 1, 0
	w.machine.Congested(false)
	if w.engine != nil {
		w.engine.Congested(false)
		w.engine.Doubt(false)
		w.carryOut()
	}
	for _, c := range w.clients {
		c.ep.CloseWrite()
	}
	for round := 0; ; round++ {
		w.now = w.now.Add(time.Second)
		if len(w.toServer) > 100 { // ends that answer each other for ever are the model's own
			w.toServer = nil
		}
		busy := w.engine != nil
		for _, c := range w.clients {
			if c.gone || c.told || c.ep.State == tcptest.Reset {
				continue
			}
			if c.ep.State != tcptest.Established || !c.ep.Over() || len(c.heard) < len(c.expects()) {
				busy = true
			}
			if c.ep.State == tcptest.SynSent {
				c.ep.Handshake()
			} else if !c.ep.Resend(120) && !c.ep.Send(120) {
				c.ep.Probe()
			}
			w.listen(c)
		}
		if !busy {
			break
		}
		if round > 400 {
			w.t.Fatalf("no end in sight: %s", w)
		}
		for _, t := range w.order {
			w.serve(t)
			w.host[t].ep.Ack()
			if !w.host[t].ep.Resend(120) {
				w.host[t].ep.Send(120)
			}
			w.speak(w.host[t])
		}
		for len(w.toServer) > 0 {
			w.deliver(&w.toServer, true, w.toServerNow)
		}
		w.tick()
		w.stabilize(stream.Position(len(w.log)))
		for len(w.toClient) > 0 {
			w.deliver(&w.toClient, true, w.toClientNow)
		}
	}
	w.stabilize(stream.Position(len(w.log)))
	for id, c := range w.waits {
		w.t.Errorf("packet %d waits for ever: %+v", id, c.seg)
	}
}

func testTakeover(t *rapid.T, crashes int) {
	w := &world{
		t: t, rnd: rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1)), now: time.Unix(1000, 0), host: map[stream.FourTuple]*served{}, ledger: replay.NewLedger(),
		machine: tcpwrap.NewMachine(1, 1, tcpwrap.DefaultLimits()), waits: map[tcpwrap.PacketID]*caught{},
		slow: rapid.SampledFrom([]int{1, 3, 30}).Draw(t, "slow"), lazy: rapid.SampledFrom([]int{0, 3, 20}).Draw(t, "lazy"), strict: rapid.Bool().Draw(t, "strict"),
		overruns: rapid.SampledFrom([]int{0, 4, 10}).Draw(t, "overruns"),
	}
	for range rapid.IntRange(1, 3).Draw(t, "clients") {
		w.dial()
	}
	w.steps("before protection counts", 8)
	w.checkpoint(func() { w.steps("first dump", 1) }, false)
	for range crashes {
		w.steps("protected", 20)
		for range rapid.IntRange(0, 2).Draw(t, "generations") {
			if len(w.clients) < 5 {
				w.dial()
			}
			if w.engine == nil { // neither does the node while a connection lags
				w.checkpoint(func() { w.steps("dump", 1) }, w.chance(4))
			}
			w.steps("protected", 20)
		}
		if len(w.gens) == 0 || w.gens[0].pos > w.stable {
			w.stabilize(stream.Position(len(w.log))) // no protection before the first generation is stable
		}
		w.crash()
		w.takeover()
		w.steps("after", 20)
	}
	w.finish()
}

// A primary's host dies at any point, once or twice, whatever was under way. No
// client notices: what it hears is what it would have heard, byte for byte, and
// no connection is reset.
func TestTakeoverIsInvisible(t *testing.T) {
	for range 4 {
		rapid.Check(t, func(t *rapid.T) { testTakeover(t, 1) })
	}
}

func TestTwoTakeoversAreInvisible(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) { testTakeover(t, 2) })
}
