package sim

import (
	"fmt"
	"strings"
	"time"
)

// Setup is what stays the same in a schedule.
type Setup struct {
	Nodes      int
	Slow       int  // how seldom the server reads
	Overruns   int  // one in so many segments is dropped for want of memory, 0: none
	BadImages  int  // one in so many restores fails, 0: none
	Stops      int  // one in so many steps of a generation is the last one before its host is stopped, 0: none
	Timestamps bool // RFC 7323
	Strict     bool // TCP discards what reaches beyond its window (Linux since 6.17)
}

// Op is a kind of step.
type Op uint8

// Steps of a schedule.
const (
	OpAct Op = iota // a client does something
	OpUp            // a packet reaches the address
	OpDown
	OpServe  // the server does something on a connection
	OpLog    // the log's traffic flows
	OpLogOne // one message of it
	OpRead   // a standby reads the log, and perhaps brings a generation here
	OpTime
	OpDial
	OpGenerate // the primary takes a generation, or goes on with it
	OpWait     // nothing happens but what time brings
	OpCongest

	OpKillHost
	OpKillServer
	OpKillAgent
	OpPause
	OpResume
	OpCutClients
	OpCutCarrier
	OpCutLog
	OpMend
	OpLogRestart
	OpLogDrop
	OpLogFull
	OpLogStale
	OpRepair // a node that has ended, or died, is a standby again
	ops
)

var opNames = [ops]string{
	"client acts", "packet to the server", "packet to a client", "server acts", "log flows", "log: one message",
	"standby reads", "time", "new client", "generation", "wait", "congestion",
	"KILL HOST", "KILL SERVER", "KILL AGENT", "PAUSE", "RESUME", "CUT CLIENTS", "CUT CARRIER", "CUT LOG", "MEND",
	"LOG RESTARTS", "LOG LOSES APPENDS", "LOG FULL", "LOG STALE", "REPAIR",
}

// faulty is where faults begin.
const faulty = OpKillHost

// Step is one thing that happens. All chance in it comes from Seed.
type Step struct {
	Op   Op
	Seed uint64
}

// Schedule is all that happens, but for how the clients finish.
type Schedule struct {
	Seed  uint64
	Setup Setup
	Steps []Step
}

// Weights of the steps, in a schedule that has not lost its primary.
var weights = [ops]int{
	OpAct: 30, OpUp: 30, OpDown: 26, OpServe: 30, OpLog: 16, OpLogOne: 12, OpRead: 10, OpTime: 14, OpDial: 2, OpGenerate: 8, OpWait: 4, OpCongest: 1,
	OpKillHost: 1, OpKillServer: 1, OpKillAgent: 1, OpPause: 2, OpResume: 2, OpCutClients: 1, OpCutCarrier: 1, OpCutLog: 2, OpMend: 4,
	OpLogRestart: 1, OpLogDrop: 2, OpLogFull: 1, OpLogStale: 1, OpRepair: 2,
}

// Generate makes the schedule of a seed.
func Generate(seed uint64) *Schedule {
	d := dice{seed*0x9e3779b97f4a7c15 + 1}
	s := &Schedule{Seed: seed, Setup: Setup{
		Nodes: d.between(2, 4), Slow: []int{1, 1, 3, 20}[d.n(4)], Overruns: []int{0, 0, 4, 10}[d.n(4)],
		BadImages: []int{0, 0, 0, 6}[d.n(4)], Stops: []int{0, 0, 0, 8}[d.n(4)], Timestamps: d.chance(2), Strict: d.chance(2),
	}}
	w := weights
	for o := faulty; o < ops; o++ { // each seed has its own troubles
		if !d.chance(3) {
			w[o] *= d.n(4)
		}
	}
	if s.Setup.Stops > 0 {
		w[OpWait] *= 3
		w[OpGenerate] *= 2
		w[OpResume] += 2
	}
	total := 0
	for _, x := range w {
		total += x
	}
	n := d.between(60, 360)
	s.Steps = make([]Step, 0, n+8)
	// A service that nobody could take over is not worth many steps.
	for _, o := range []Op{OpDial, OpAct, OpUp, OpGenerate, OpLog, OpGenerate, OpLog, OpRead} {
		s.Steps = append(s.Steps, Step{o, d.next()})
	}
	for range n {
		k := d.n(total)
		for o, x := range w {
			if k -= x; k < 0 {
				s.Steps = append(s.Steps, Step{Op(o), d.next()})
				break
			}
		}
	}
	return s
}

func (s *Schedule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, %+v, %d steps:\n", s.Seed, s.Setup, len(s.Steps))
	for i, x := range s.Steps {
		fmt.Fprintf(&b, "%4d  %-22s %#016x\n", i, opNames[x.Op], x.Seed)
	}
	return b.String()
}

// do makes a step happen.
func (w *World) do(s *Step) {
	w.d.s = s.Seed
	d := &w.d
	w.say("-- %d (%v): %s", w.step, w.now.Sub(time.Unix(1000, 0)), opNames[s.Op])
	if s.Op < OpWait {
		w.advance(time.Duration(d.n(3)) * time.Millisecond)
	}
	n := w.nodes[d.n(len(w.nodes))]
	switch s.Op {
	case OpAct:
		if len(w.clients) > 0 {
			w.act(w.clients[d.n(len(w.clients))])
		}
	case OpUp:
		for range d.between(1, 3) {
			w.deliver(&w.toServer, false, w.toServerNow)
		}
	case OpDown:
		for range d.between(1, 3) {
			w.deliver(&w.toClient, false, w.toClientNow)
		}
	case OpServe:
		for range d.between(1, 3) {
			for _, n := range w.nodes {
				if n.serving && n.runs() && len(n.order) > 0 {
					n.serve(n.order[d.n(len(n.order))])
				}
			}
		}
	case OpLog:
		w.pump(d.between(2, 8))
	case OpLogOne:
		w.one()
	case OpRead:
		n.followLog(d.between(1, 40))
		if d.chance(2) {
			n.fetch()
		}
	case OpTime:
		w.advance(time.Duration(d.between(1, 12)) * time.Millisecond)
	case OpDial:
		if len(w.clients) < maxClients {
			w.dial()
		}
	case OpGenerate:
		for _, n := range w.nodes {
			if n.gen == nil {
				n.beginGeneration()
			}
			for range d.between(1, 3) {
				n.advanceGeneration()
			}
			if n.gen != nil && w.setup.Stops > 0 && d.chance(w.setup.Stops) {
				w.say("%s: is stopped in the middle of a generation", n.name)
				n.paused = true
			}
		}
	case OpWait:
		w.wait(time.Duration(d.between(1, 8)*d.between(1, 8)) * 10 * time.Millisecond)
	case OpCongest:
		for _, n := range w.nodes {
			if n.machine != nil {
				n.machine.Congested(d.chance(3))
			}
		}
	default:
		w.fault(s.Op, n)
	}
}

// wait lets time pass in which the log's traffic flows.
func (w *World) wait(t time.Duration) {
	w.say("%v pass", t)
	for end := w.now.Add(t); w.now.Before(end); {
		w.advance(2 * tickEvery)
		w.pump(4)
		w.attend()
	}
}

// one moves a single message of the log's traffic.
func (w *World) one() {
	if len(w.log.conns) == 0 {
		return
	}
	c := w.log.conns[w.d.n(len(w.log.conns))]
	if w.d.chance(2) && w.log.pumpUp(c) || w.log.pumpDown(c) || w.log.pumpUp(c) {
		return
	}
	w.nodes[w.d.n(len(w.nodes))].reach()
}

// busiest is the primary, most often, and else n: faults that hit nobody teach
// nothing.
func (w *World) busiest(n *node) *node {
	if w.d.chance(3) {
		return n
	}
	for _, p := range w.nodes {
		if p.runs() && p.agent && (p.role == primary || p.role == taking) && w.epochOf(p) {
			return p
		}
	}
	return n
}

// resume lets a host that was stopped go on, each of its threads where it was: the
// one that takes a generation may be quicker than the one that learns of a fence.
func (n *node) resume() {
	n.w.say("%s: goes on", n.name)
	n.paused = false
	for range n.w.d.n(5) {
		n.advanceGeneration()
	}
}

// lastHope reports whether nobody but n serves or could.
func (w *World) lastHope(n *node) bool {
	for _, o := range w.nodes {
		if o == n || !o.up || !o.agent {
			continue
		}
		if o.role == standby && o.newest != nil && !o.judge.HeardAt().IsZero() || o.role == primary && o.serving && w.epochOf(o) {
			return false
		}
	}
	return true
}

func (w *World) fault(o Op, n *node) {
	d := &w.d
	p := w.busiest(n)
	if (o == OpKillHost || o == OpKillServer || o == OpKillAgent) && w.lastHope(p) && !d.chance(12) {
		return
	}
	switch o {
	case OpKillHost:
		w.say("%s: its host dies", p.name)
		p.die()
	case OpKillServer:
		if p.role == primary && p.serving && !p.frozen() && p.runs() {
			w.say("%s: its server dies", p.name)
			p.serverGone()
		}
	case OpKillAgent:
		if p.up && p.agent {
			w.say("%s: its agent dies", p.name)
			p.endAgent()
		}
	case OpPause:
		if p.up {
			w.say("%s: is stopped", p.name)
			p.paused = true
		}
	case OpResume:
		for _, n := range w.nodes {
			if n.paused && d.chance(2) {
				n.resume()
			}
		}
	case OpCutClients:
		w.say("%s: cut off from the clients", p.name)
		p.cutClients = true
	case OpCutCarrier:
		w.say("%s: link down", p.name)
		p.setCarrier(false)
	case OpCutLog:
		way := d.n(3)
		w.say("%s: cut off from the log (%d)", p.name, way)
		p.cutLogUp, p.cutLogDown = p.cutLogUp || way != 1, p.cutLogDown || way != 0
	case OpMend:
		for _, n := range w.nodes {
			if d.chance(2) {
				n.cutClients, n.cutLogUp, n.cutLogDown = false, false, false
				n.setCarrier(true)
			}
		}
		if d.chance(2) {
			w.log.up, w.log.full, w.log.stale, w.log.dropNext = true, false, 0, 0
		}
	case OpLogRestart:
		w.log.restart()
		w.log.up = d.chance(2)
		w.say("the log's server restarts; up: %v", w.log.up)
	case OpLogDrop:
		w.log.dropNext += d.between(1, 3)
	case OpLogFull:
		w.log.full = true
	case OpLogStale:
		w.log.stale = d.between(1, 6)
	case OpRepair:
		for _, n := range w.nodes {
			if (n.role == ended || n.role == broken) && !n.paused && d.chance(2) {
				w.say("%s: is a standby again", n.name)
				n.up, n.agent = true, true
				n.stand()
			}
		}
	}
}
