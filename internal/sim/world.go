package sim

import (
	"fmt"
	"runtime/debug"
	"time"

	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// World is a service, its clients, its nodes and its log, between which anything
// can happen.
type World struct {
	setup Setup
	d     dice // the present step's
	now   time.Time
	slow  int  // how seldom the server reads, 1 is always
	calm  bool // nothing is lost or late any more

	log       logServer
	store     storeServer
	nodes     []*node
	route     int // the node that clients' packets reach
	clients   []*client
	toServer  []tcpwrap.Segment
	toClient  []tcpwrap.Segment
	truth     truth
	manifests map[stream.Hash]*generation
	gens      uint64
	takes     uint64

	step      int
	verbose   bool
	said      func(string)
	clockFn   func() uint32
	overrunFn func() bool
}

// Outcome is what came of a schedule.
type Outcome struct {
	Violation *Violation
	Takeovers int  // that went live
	Lost      bool // the service was lost, as it has to be with what happened
}

func newWorld(s *Schedule, said func(string)) *World {
	w := &World{
		setup: s.Setup, now: time.Unix(1000, 0), slow: s.Setup.Slow,
		manifests: map[stream.Hash]*generation{}, said: said, verbose: said != nil,
	}
	w.d.s = s.Seed
	w.log.w, w.log.up = w, true
	w.store.at = map[stream.Hash]uint64{}
	w.truth = truth{w: w, follow: stream.NewFollow(0), conns: map[stream.ConnID]int{}}
	w.clockFn = w.clock
	w.overrunFn = func() bool { return !w.calm && w.d.chance(w.setup.Overruns) }
	for i := range s.Setup.Nodes {
		w.nodes = append(w.nodes, newNode(w, i))
	}
	w.protect(w.nodes[0])
	return w
}

// protect makes the first node the primary of the server that runs there.
func (w *World) protect(n *node) {
	n.stand()
	f := stream.Fence{Epoch: 1, Node: n.name, Nonce: [16]byte{1}, At: w.now}
	c := w.log.connect(n, false)
	r, _ := w.log.handle(c, &ask{kind: askFence, fence: f})
	f.Seq = r.seq
	n.log = &logLink{core: stream.NewCore(f, 0, 0, ackTime, maxBacklog, w.now), conn: c}
	n.epoch, n.role, n.vip, n.serving, n.first = 1, primary, true, true, 1
	n.machine = tcpwrap.NewMachine(1, 1, tcpwrap.DefaultLimits())
	n.machine.Append(stream.Hello{})
	n.carryOut()
}

func (w *World) violate(promise int, format string, args ...any) {
	panic(&Violation{Promise: promise, What: fmt.Sprintf(format, args...), Step: w.step})
}

// say tells what happens, when somebody listens.
func (w *World) say(format string, args ...any) {
	if w.verbose {
		w.said(fmt.Sprintf(format, args...))
	}
}

// Run runs a schedule; said, which may be nil, hears what happens.
func Run(s *Schedule, said func(string)) (out Outcome) {
	w := newWorld(s, said)
	defer func() {
		out.Takeovers = int(w.truth.epoch) - 1
		switch p := recover().(type) {
		case nil:
		case *Violation:
			out.Violation = p
		default:
			out.Violation = &Violation{Step: w.step, What: fmt.Sprintf("panic: %v\n%s", p, debug.Stack())}
		}
	}()
	for i := range s.Steps {
		w.step = i
		w.do(&s.Steps[i])
		w.settle()
		w.truth.check()
	}
	w.step = len(s.Steps)
	w.d.s = s.Seed ^ 0xf1415
	out.Lost = !w.finish()
	return out
}

// settle lets every writer do what it can without an answer.
func (w *World) settle() {
	for _, n := range w.nodes {
		n.drive()
	}
	w.log.sweep()
}

// advance lets time pass.
func (w *World) advance(d time.Duration) {
	for d > 0 {
		step := min(d, tickEvery)
		if step == tickEvery && d > 100*tickEvery && w.calm {
			step = 2 * tickEvery // what counts is silence
		}
		w.now = w.now.Add(step)
		d -= step
		for _, n := range w.nodes {
			n.tick()
		}
	}
}

// pump lets everything to do with the log travel for a while.
func (w *World) pump(rounds int) {
	for range rounds {
		moved := false
		for i := 0; i < len(w.log.conns); i++ {
			c := w.log.conns[i]
			moved = w.log.pumpUp(c) || moved
			moved = w.log.pumpDown(c) || moved
		}
		for _, n := range w.nodes {
			moved = n.reach() || moved
			moved = n.advanceGeneration() || moved
		}
		w.settle()
		if !moved {
			return
		}
	}
}

func (w *World) attend() {
	for _, n := range w.nodes {
		n.followLog(1000)
		n.fetch()
	}
}

// heal ends every fault that can end.
func (w *World) heal() {
	w.say("all that can be mended is mended")
	w.calm, w.slow = true, 1
	w.log.up, w.log.full, w.log.stale, w.log.dropNext = true, false, 0, 0
	for _, n := range w.nodes {
		n.cutClients, n.cutLogUp, n.cutLogDown = false, false, false
		n.setCarrier(true)
		if n.paused {
			n.resume()
		}
		if n.machine != nil {
			n.machine.Congested(false)
		}
	}
}

func (n *node) setCarrier(up bool) {
	if n.carrier != up {
		n.carrier = up
		n.judge.Link(up, n.w.now)
	}
}

// hopeless reports whether the service cannot go on, by no fault of the protocol:
// nobody is left who serves it or could.
func (w *World) hopeless() bool {
	for _, n := range w.nodes {
		if !n.up || !n.agent {
			continue
		}
		if (n.role == primary || n.role == taking) && w.epochOf(n) && (n.serving || n.role == taking) {
			return false
		}
		if n.role == standby || n.role == taking {
			// One that has never heard of a primary does not suspect any.
			if w.truth.newest != nil && (!n.judge.HeardAt().IsZero() || w.truth.exited) {
				return false
			}
		}
	}
	return true
}

// finish lets every conversation come to its end, without faults. It answers
// false when the service is lost for good reason.
func (w *World) finish() bool {
	w.heal()
	for _, c := range w.clients {
		c.ep.CloseWrite()
	}
	begin := w.now
	for round := 0; ; round++ {
		busy := false
		for _, c := range w.clients {
			if c.gone || c.told || c.ep.State == tcptest.Reset {
				continue
			}
			if c.ep.State != tcptest.Established || !c.ep.Over() || c.heard < len(c.want) || !c.ended {
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
			return true
		}
		if w.hopeless() {
			w.say("nobody is left to serve")
			return false
		}
		if w.now.Sub(begin) > 60*time.Second {
			w.violate(6, "the clients do not come to their end: %s", w)
		}
		served := false
		if len(w.toServer) > 60 { // ends that answer each other for ever are the model's own
			w.toServer = w.toServer[:0]
		}
		for len(w.toServer) > 0 {
			w.deliver(&w.toServer, true, w.toServerNow)
		}
		for _, n := range w.nodes {
			if !n.serving || n.role != primary || !n.runs() {
				continue
			}
			served = true
			for _, t := range n.order {
				n.serve(t)
				h := n.tcp[t]
				if h == nil {
					break
				}
				h.ep.Ack()
				if !h.ep.Resend(120) {
					h.ep.Send(120)
				}
				n.speak(h)
			}
		}
		w.attend()
		w.pump(40)
		for len(w.toClient) > 0 {
			w.deliver(&w.toClient, true, w.toClientNow)
		}
		pause := 20 * time.Millisecond
		if !served {
			pause = 100 * time.Millisecond
		}
		w.advance(pause)
		w.pump(10)
		w.settle()
		w.truth.check()
	}
}

func (w *World) String() string {
	s := ""
	for _, c := range w.clients {
		s += fmt.Sprintf("\n  client %d: state %d, said %d, acknowledged %d of %d, heard %d of %d", c.name, c.ep.State, c.said, c.ep.Una, c.ep.Nxt, c.heard, len(c.want))
	}
	for _, n := range w.nodes {
		s += fmt.Sprintf("\n  %s: %s, epoch %d, up %v, agent %v, serving %v", n.name, roleNames[n.role], n.epoch, n.up, n.agent, n.serving)
		if n.log != nil {
			s += fmt.Sprintf(", writer %+v", n.log.core.State())
		}
		if n.role == taking {
			s += fmt.Sprintf(", takeover stage %d", n.take.stage)
		}
		if n.newest != nil {
			s += fmt.Sprintf(", generation %d", n.newest.g.rec.ID)
		}
		for _, t := range n.order {
			if h := n.tcp[t]; h != nil {
				s += fmt.Sprintf("\n    %d: state %d, received %d, read %d, acknowledged %d of %d", t.Client.Port(), h.ep.State, h.ep.RcvNxt, h.app.Heard, h.ep.Una, h.ep.Nxt)
			}
		}
	}
	return s
}

func show(s *tcpwrap.Segment) string {
	names := ""
	for i, f := range []tcpwrap.Flags{tcpwrap.FIN, tcpwrap.SYN, tcpwrap.RST, tcpwrap.PSH, tcpwrap.ACK} {
		if s.Flags.Has(f) {
			names += "FSRPA"[i : i+1]
		}
	}
	way := "from"
	if s.Dir == tcpwrap.Outbound {
		way = "to"
	}
	return fmt.Sprintf("%s client %d %s seq %d ack %d win %d, %d octets", way, int(s.Tuple.Client.Port())-firstPort, names, s.Seq, s.Ack, s.Window, len(s.Payload))
}
