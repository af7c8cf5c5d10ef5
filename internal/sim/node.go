package sim

import (
	"errors"
	"time"

	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// role is what a node is.
type role uint8

const (
	standby role = iota
	taking       // over
	primary
	ended  // its agent has ended: fenced, failed or told to
	broken // the takeover failed
)

var roleNames = [...]string{"standby", "taking over", "primary", "ended", "broken"}

// Times of internal/node.
const (
	tickEvery     = 5 * time.Millisecond
	detect        = 100 * time.Millisecond
	fenceTime     = 5 * time.Second
	quietTime     = 5 * time.Second
	partingTime   = 10 * time.Second
	reopenAfter   = 500 * time.Millisecond
	announceEvery = 10 * time.Second
	ackTime       = 500 * time.Millisecond
	apiTimeout    = 1 * time.Second
	clockMargin   = 200
	maxBacklog    = 64 << 20
)

// node is a host with its agent.
type node struct {
	host
	w    *World
	num  int
	name string

	up         bool // the host lives
	agent      bool // its agent does
	paused     bool // the whole of it
	cutClients bool // no packet from or to clients, and the host does not know
	carrier    bool // the host's link to the clients is up
	cutLogUp   bool
	cutLogDown bool
	vip        bool // the address is here
	serving    bool // the server lives
	dying      bool // its kernel is tearing it down
	role       role

	// As primary, or on the way to be it.
	epoch     stream.Epoch
	machine   *tcpwrap.Machine
	engine    *replay.Engine
	log       *logLink
	gen       *genJob
	kept      []*generation
	lastID    uint64
	first     stream.Position
	beatAt    time.Time
	announced time.Time // the address, the last time
	take      *takeover
	survivors []replay.Survivor
	known     map[stream.Hash]bool // what the store is believed to have; nil: not asked yet
	stale     map[stream.Hash]bool // what it has and may not be relied upon, in messages up to staleTo
	staleTo   uint64
	trusted   map[stream.Hash]bool // nil: all
	proven    bool                 // known and stale are older than any other fence
	exitUntil time.Time            // how long the log may take to hear of the server's death

	// As standby.
	judge     *roles.Judge
	ledger    *replay.Ledger
	follow    *stream.Follow
	from      stream.StreamSeq // next message
	strict    bool
	reopen    time.Time
	newest    *local
	before    *local
	ownBeatAt time.Time
}

// local is a generation whose image is on this host.
type local struct {
	g  *generation
	at time.Time // when its record was read
}

// logLink is a node's writer with its connection: what stream.Writer's goroutine
// does.
type logLink struct {
	core    *stream.Core
	conn    *logConn
	doing   stream.DoKind // that waits for an answer; DoWait: none
	until   time.Time     // when it is given up
	failed  error         // an append was refused
	endSeen bool
}

func newNode(w *World, num int) *node {
	n := &node{w: w, num: num, name: string(rune('a' + num)), up: true, agent: true, carrier: true}
	n.clear()
	n.stand()
	return n
}

// stand makes the node a fresh standby.
func (n *node) stand() {
	n.role = standby
	n.judge = roles.NewJudge(n.name, detect, tickEvery)
	n.ledger, n.follow, n.from, n.strict = replay.NewLedger(), stream.NewFollow(0), 1, false
	n.newest, n.before, n.reopen = nil, nil, time.Time{}
	n.take, n.machine, n.engine, n.log, n.gen, n.kept, n.known = nil, nil, nil, nil, nil, nil, nil
	n.trusted = nil
	n.vip, n.serving, n.dying = false, false, false
	n.clear()
}

func (n *node) runs() bool { return n.up && !n.paused }

// die is the end of the host.
func (n *node) die() {
	n.up, n.vip, n.serving = false, false, false
	n.role = ended
	n.endAgent()
	n.clear()
}

// endAgent is the end of the agent's process.
func (n *node) endAgent() {
	n.agent = false
	n.closeConns()
	n.machine, n.engine, n.log, n.take, n.gen = nil, nil, nil, nil, nil
	n.waits = n.waits[:0] // their queue is gone
	n.role = ended
}

func (n *node) closeConns() {
	for _, c := range n.w.log.conns {
		if c.n == n {
			c.closed = true
		}
	}
}

// usable is internal/node's: whether the log leads from the image to the present.
func (n *node) usable() bool { return n.newest != nil }

// tick is what time brings.
func (n *node) tick() {
	if !n.runs() || !n.agent {
		return
	}
	switch n.role {
	case standby:
		n.beatStandby()
		n.watch()
	case taking:
		n.beatStandby()
		if n.log != nil { // it has the fence
			n.beatPrimary()
		}
		n.takeOn()
	case primary:
		n.beatPrimary()
	}
	if n.role == primary || n.role == taking {
		n.tickDriver()
	}
	n.drive()
	if n.role == primary && n.dying && (n.log.core.Stable() == n.log.core.Next()-1 || n.w.now.After(n.exitUntil)) {
		n.w.say("%s: makes way", n.name)
		n.leaveHost()
	}
}

func (n *node) beatPrimary() {
	if n.vip && n.carrier && n.epoch > 1 && n.w.now.Sub(n.announced) >= announceEvery { // replay/capsule's
		n.announced, n.w.route = n.w.now, n.num
	}
	if n.w.now.Sub(n.beatAt) >= roles.BeatEvery {
		n.beatAt = n.w.now
		n.w.beat(roles.Primary, n)
	}
}

func (n *node) beatStandby() {
	if n.w.now.Sub(n.ownBeatAt) >= roles.StandbyBeatEvery {
		n.ownBeatAt = n.w.now
		n.w.beat(roles.Standby, n)
	}
}

// beat brings a heartbeat to every node that listens; it takes no time.
func (w *World) beat(role string, from *node) {
	if !w.log.up || from.cutLogUp {
		return
	}
	for _, n := range w.nodes {
		if n.runs() && n.agent && (n.role == standby || n.role == taking) && !n.cutLogDown {
			n.judge.Beat(role, from.name, w.now)
		}
	}
}

// tickDriver is the driver's tick.
func (n *node) tickDriver() {
	if n.engine != nil && !n.frozen() {
		n.engine.Busy(n.w.d.chance(4), n.engine.Born())
		n.engine.Tick(n.w.now)
		n.carryOut()
		if n.machine != nil {
			if cuts := n.engine.Joined(); len(cuts) > 0 {
				n.machine.Adopt(cuts)
			}
			n.carryOut()
			if n.engine.Remaining() == 0 {
				n.engine = nil
			}
		}
	}
	if n.log == nil {
		return
	}
	doubt := !n.carrier || n.log.core.State().Phase != stream.WriterOK
	if n.engine != nil {
		n.engine.Doubt(doubt)
	}
	if n.machine != nil {
		n.machine.Doubt(n.w.now, doubt)
		n.machine.Tick()
	}
	n.carryOut()
}

// watch is the standby's look at the primary.
func (n *node) watch() {
	why, _ := n.judge.Reason(n.w.now, roles.Situation{
		Epoch: n.ledger.Fence.Epoch, Usable: n.usable(), Released: n.ledger.Released, Exited: n.ledger.Exited,
	})
	if why != "" {
		n.w.say("%s: %s", n.name, why)
		n.beginTakeover()
	}
}

// followLog reads up to k messages.
func (n *node) followLog(k int) {
	if n.role != standby && (n.role != taking || n.take == nil) || !n.runs() || !n.agent || !n.w.log.up || n.cutLogUp || n.cutLogDown || n.w.now.Before(n.reopen) {
		return
	}
	next, err := n.w.log.read(n.follow, n.from, n.strict, n.from+stream.StreamSeq(k)-1, func(e stream.Entry) {
		n.ledger.Apply(n.w.now, e)
		if e.Fence != nil {
			n.judge.Fence(e.Fence.Node, n.w.now)
		}
	})
	if next != n.from {
		n.w.say("%s: has read the log up to %d", n.name, next-1)
		n.from, n.strict = next, false
	}
	if err == nil {
		return
	}
	n.w.say("%s: the log cannot be followed: %v", n.name, err)
	n.ledger = replay.NewLedger()
	n.from, n.strict = 1, false
	if n.newest != nil {
		n.ledger.Introduce(n.newest.g.rec, n.newest.g.tuples())
		if from := n.newest.g.rec.FromSeq; !errors.Is(err, stream.ErrPurged) {
			n.from, n.strict = max(from, 1), from > 1
		}
	}
	n.follow = stream.NewFollow(0)
	if n.from > 1 {
		n.follow = stream.NewFollow(n.w.log.epochAt(n.from))
	}
	n.reopen = n.w.now.Add(reopenAfter)
}

// fetch brings the newest generation here.
func (n *node) fetch() {
	if n.role != standby || !n.runs() || !n.agent || !n.w.log.up || n.cutLogUp || n.cutLogDown {
		return
	}
	gen := n.ledger.Gen
	if gen.ID == 0 || n.newest != nil && n.newest.g.rec.Manifest == gen.Manifest {
		return
	}
	g := n.w.manifests[gen.Manifest]
	if !n.w.store.has(gen.Manifest) || !g.complete(&n.w.store) {
		n.w.say("%s: generation %d is not in the store", n.name, gen.ID)
		return
	}
	n.before, n.newest = n.newest, &local{g, n.ledger.GenAt}
	n.ledger.Introduce(gen, g.tuples())
	n.w.say("%s: generation %d is here", n.name, gen.ID)
}

// drive is the writer's goroutine: it asks the core what to do and does it.
func (n *node) drive() {
	for spins := 0; n.log != nil && n.runs() && n.agent; spins++ {
		l := n.log
		if l.failed != nil {
			n.tenureEnds(l.failed)
			return
		}
		if l.endSeen {
			return
		}
		if l.doing != stream.DoWait {
			if n.w.now.Before(l.until) {
				return
			}
			l.doing = stream.DoWait
			n.hangUp(l)
			l.core.Lost(n.w.now, errTimeout)
		}
		if spins > 1000 {
			n.w.violate(6, "the writer of %s does not come to rest", n.name)
		}
		do := l.core.Step(n.w.now)
		switch do.Kind {
		case stream.DoWait, stream.DoGather:
			return
		case stream.DoConnect:
			n.hangUp(l)
			l.doing, l.until = do.Kind, n.w.now.Add(apiTimeout)
			return
		case stream.DoReadFence:
			n.request(l, do.Kind, ask{kind: askNewestFence})
		case stream.DoRead:
			n.request(l, do.Kind, ask{kind: askMessage, seq: do.Seq})
		case stream.DoPublish:
			if l.conn == nil || l.conn.closed {
				l.core.Lost(n.w.now, errLost)
				continue
			}
			l.conn.up = append(l.conn.up, ask{kind: askAppend, number: do.Number, data: append([]byte(nil), do.Data...), cond: do.If})
		case stream.DoStable:
			n.w.say("%s: stable up to %d", n.name, do.UpTo)
			if n.machine != nil {
				n.machine.Stable(n.w.now, do.UpTo)
			}
			if n.engine != nil {
				n.engine.Stable(n.w.now, do.UpTo)
			}
			n.carryOut()
		case stream.DoEnd:
			l.endSeen = true
			n.hangUp(l)
			n.w.say("%s: the writer ends: %v", n.name, do.Err)
			n.tenureEnds(do.Err)
			return
		}
	}
}

func (n *node) hangUp(l *logLink) {
	if l.conn != nil {
		l.conn.closed = true
		l.conn = nil
	}
}

func (n *node) request(l *logLink, kind stream.DoKind, a ask) {
	if l.conn == nil || l.conn.closed {
		l.core.Lost(n.w.now, errLost)
		return
	}
	l.conn.up = append(l.conn.up, a)
	l.doing, l.until = kind, n.w.now.Add(apiTimeout)
}

// reach completes a connection that is wanted.
func (n *node) reach() bool {
	l := n.log
	if l == nil || l.doing != stream.DoConnect || !n.runs() || !n.agent || n.cutLogUp || n.cutLogDown {
		return false
	}
	l.doing = stream.DoWait
	if !n.w.log.up {
		l.core.Lost(n.w.now, errDown)
	} else {
		l.conn = n.w.log.connect(n, false)
		l.core.Connected(n.w.now)
	}
	n.drive()
	return true
}

// connLost: the server has ended a connection.
func (n *node) connLost(c *logConn) {
	switch {
	case c.claiming:
		if n.take != nil && n.take.conn == c {
			n.take.lost()
		}
	case n.log != nil && n.log.conn == c:
		n.log.conn, n.log.doing = nil, stream.DoWait
		n.log.core.Lost(n.w.now, errLost)
		n.drive()
	}
}

// answered: the server has answered.
func (n *node) answered(c *logConn, r *answer) {
	if c.claiming {
		if n.take != nil && n.take.conn == c {
			n.take.answered(r)
		}
		return
	}
	l := n.log
	if l == nil || l.conn != c {
		return
	}
	now := n.w.now
	switch r.kind {
	case askAppend:
		if r.err != nil {
			l.core.Rejected(now, r.number, r.err)
		} else {
			l.core.Acked(now, r.number, r.seq)
		}
	case askNewestFence:
		l.doing = stream.DoWait
		l.core.FenceRead(now, *r.msg.fence)
	case askMessage:
		l.doing = stream.DoWait
		l.core.MessageRead(now, r.there, r.msg.fence == nil, r.msg.data)
	}
	n.drive()
}

// tenureEnds is the end of a primary whose writer or queue has ended.
func (n *node) tenureEnds(err error) {
	if n.machine != nil {
		n.machine.Stop()
		n.carryOut()
	}
	switch roles.AfterEnd(err) {
	case roles.Leave:
		n.w.say("%s: fenced", n.name)
		n.leaveHost()
	default:
		n.w.say("%s: closes: %v", n.name, err)
		n.closeConns()
		n.role = ended
		n.machine, n.engine, n.log, n.gen = nil, nil, nil, nil
		n.agent = false // the rules stay, and drop
	}
}

// leaveHost takes the address and the sockets off this host.
func (n *node) leaveHost() {
	n.closeConns()
	n.vip, n.serving = false, false
	n.clear()
	n.machine, n.engine, n.log, n.gen, n.take = nil, nil, nil, nil, nil
	n.agent = false
	n.role = ended
}

// serverGone is the end of a primary whose server has died.
func (n *node) serverGone() {
	n.shut()
	if n.machine == nil {
		return
	}
	n.machine.Stop()
	n.machine.Append(stream.ServerExit{})
	n.carryOut()
	n.clear()
	n.vip = false
	n.exitUntil = n.w.now.Add(partingTime)
	n.drive()
}
