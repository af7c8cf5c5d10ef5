package sim

import (
	"bytes"
	"slices"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// served is a connection on a server's host.
type served struct {
	ep       *tcptest.Endpoint
	app      tcptest.App
	accepted bool // by the server; before that it is in no image
}

// caught is a packet that waits for its verdict.
type caught struct {
	id  tcpwrap.PacketID
	seg tcpwrap.Segment
}

// host is what of a node's kernel and server there is: its TCP, and the queue in
// which packets wait for the agent.
type host struct {
	tcp   map[stream.FourTuple]*served
	order []stream.FourTuple
	id    tcpwrap.PacketID
	waits []caught
	buf   []byte
}

func (h *host) clear() {
	h.tcp, h.order, h.waits = map[stream.FourTuple]*served{}, nil, h.waits[:0]
}

// catch is a packet on its way through the host, in either direction: what
// internal/node's driver does with it.
func (n *node) catch(s tcpwrap.Segment) {
	if !n.agent || n.machine == nil && n.engine == nil {
		return // a queue without an owner drops
	}
	n.id++
	id := n.id
	n.waits = append(n.waits, caught{id, s})
	own := s
	own.Payload = bytes.Clone(s.Payload)
	switch {
	case n.frozen() && n.engine != nil && n.engine.Owns(s.Tuple):
		n.verdict(tcpwrap.Decision{ID: id, Verdict: tcpwrap.Drop})
	case n.engine != nil && n.engine.Owns(s.Tuple) && n.engine.Packet(n.w.now, id, &own):
	case n.machine != nil:
		n.machine.Packet(n.w.now, id, &own, s.Dir == tcpwrap.Outbound && n.dying)
	default:
		n.verdict(tcpwrap.Decision{ID: id, Verdict: tcpwrap.Drop})
	}
	n.carryOut()
	for i := range own.Payload {
		own.Payload[i] = 0xee // whoever keeps it has to have copied it
	}
}

func (n *node) frozen() bool { return n.machine != nil && n.machine.Frozen() }

// carryOut does what the machines want done.
func (n *node) carryOut() {
	if n.machine != nil {
		n.perform(&n.machine.Ready)
	}
	if n.engine != nil {
		n.perform(&n.engine.Ready)
		for len(n.engine.Births) > 0 {
			births := n.engine.Births
			n.engine.Births = nil
			for i := range births {
				n.bear(&births[i])
			}
			n.perform(&n.engine.Ready)
		}
	}
}

func (n *node) perform(r *tcpwrap.Ready) {
	if len(r.Records)+len(r.Segments)+len(r.Verdicts) == 0 {
		return
	}
	for i := range r.Records {
		if n.w.verbose {
			n.w.say("%s: record %d: %T%+v", n.name, r.Records[i].Pos, r.Records[i].Record, r.Records[i].Record)
		}
		if err := n.log.core.Append(r.Records[i].Pos, r.Records[i].Record); err != nil {
			if n.engine != nil {
				n.engine.Doubt(true)
			}
			if n.machine != nil {
				n.machine.Stop()
			}
			n.log.failed = err
			break
		}
	}
	segments, verdicts := slices.Clone(r.Segments), slices.Clone(r.Verdicts)
	n.buf = n.buf[:0]
	var ends [16]int // of the packets
	at := ends[:0]
	segments = slices.DeleteFunc(segments, func(o tcpwrap.Outgoing) bool { return o.Unreachable }) // a mere hint
	for i := range segments {                                                                      // their payloads are good until Reset
		n.buf = tcpwrap.AppendOutgoing(n.buf, &segments[i])
		at = append(at, len(n.buf))
	}
	packets := n.buf
	n.buf = nil
	r.Reset()
	from := 0
	for i := range segments {
		n.made(&segments[i], packets[from:at[i]])
		from = at[i]
	}
	n.buf = packets
	for _, v := range verdicts {
		n.verdict(v)
	}
}

// made sends a segment that a machine made by itself.
func (n *node) made(o *tcpwrap.Outgoing, ip []byte) {
	dir := tcpwrap.Inbound
	if !o.Up {
		dir = tcpwrap.Outbound
	}
	var s tcpwrap.Segment
	if err := tcpwrap.ParseSegment(ip, dir, &s); err != nil {
		n.w.violate(4, "a segment that is none: %v", err)
	}
	s.Payload = bytes.Clone(s.Payload)
	s.RawOptions = bytes.Clone(s.RawOptions)
	if n.w.verbose {
		n.w.say("%s: makes %s", n.name, show(&s))
	}
	if o.Up {
		n.rise(&s)
		return
	}
	n.leave(s)
}

func (n *node) verdict(v tcpwrap.Decision) {
	i := slices.IndexFunc(n.waits, func(c caught) bool { return c.id == v.ID })
	if i < 0 {
		n.w.violate(4, "packet %d of %s got a verdict and was not waiting", v.ID, n.name)
	}
	s := n.waits[i].seg
	n.waits = slices.Delete(n.waits, i, i+1)
	switch {
	case v.Verdict == tcpwrap.Drop:
	case s.Dir == tcpwrap.Inbound:
		n.rise(&s)
	default:
		n.leave(s)
	}
}

// leave puts a segment on the wire to its client.
func (n *node) leave(s tcpwrap.Segment) {
	if n.w.verbose {
		n.w.say("%s: sends %s", n.name, show(&s))
	}
	if n.cutClients || !n.carrier {
		return
	}
	n.w.truth.leaves(n, n.epoch, &s)
	n.w.toClient = append(n.w.toClient, s)
}

// rise gives the host's TCP a segment.
func (n *node) rise(s *tcpwrap.Segment) {
	if !n.serving {
		return
	}
	h := n.tcp[s.Tuple]
	switch {
	case h != nil && h.ep.State != tcptest.Reset:
		h.ep.Receive(s)
	case s.Flags.Has(tcpwrap.SYN) && !s.Flags.Has(tcpwrap.ACK):
		name := int(s.Tuple.Client.Port()) - firstPort
		h = &served{ep: tcptest.Answer(n.w.config(name, true), s), app: tcptest.App{Name: name}}
		n.keep(s.Tuple, h)
	default:
		if r, ok := tcptest.Refusal(s); ok {
			n.catch(r)
		}
		return
	}
	n.speak(h)
}

func (n *node) keep(t stream.FourTuple, h *served) {
	if n.tcp[t] == nil {
		n.order = append(n.order, t)
	}
	n.tcp[t] = h
}

func (n *node) speak(h *served) {
	out := h.ep.Out
	h.ep.Out = nil
	for _, s := range out {
		n.catch(s)
	}
}

// bear re-creates a connection, as replay/reqsk does.
func (n *node) bear(b *replay.Birth) {
	if !n.serving {
		return
	}
	n.engine.Delivered(n.w.now, b.Open.Conn)
	if n.tcp[b.Open.Tuple] != nil {
		return
	}
	name := int(b.Open.Tuple.Client.Port()) - firstPort
	cfg := n.w.config(name, true)
	born, ts := n.w.now, b.ServerTS
	cfg.Clock = func() uint32 { return ts + uint32(n.w.now.Sub(born).Milliseconds()) }
	n.keep(b.Open.Tuple, &served{ep: tcptest.Reborn(cfg, b.Open, b.Accept, b.Edge), app: tcptest.App{Name: name}})
}

// serve lets the server, and its end of a connection, do something; a frozen one
// does nothing.
func (n *node) serve(t stream.FourTuple) {
	h := n.tcp[t]
	if h == nil || n.frozen() || !n.serving {
		return
	}
	d := &n.w.d
	if h.ep.State == tcptest.Established && d.chance(n.w.slow) {
		h.accepted = true
		if h.ep.Readable() > 0 {
			p := h.ep.Read(d.between(1, 400))
			h.ep.Write(h.app.Hears(p))
		}
		if h.ep.PeerClosed && h.ep.Readable() == 0 && !h.app.Done {
			h.app.Done = true
			h.ep.Write([]byte(tcptest.Bye))
			h.ep.CloseWrite()
		}
	}
	switch d.n(6) {
	case 0, 1, 2:
		h.ep.Send(d.between(1, 200))
	case 3:
		if h.ep.AckDue {
			h.ep.Ack()
		}
	case 4:
		if h.ep.State == tcptest.SynReceived {
			h.ep.Handshake()
		} else {
			h.ep.Resend(d.between(1, 200))
		}
	case 5:
		h.ep.Probe()
	}
	n.speak(h)
}

// shut is what a kernel does with the connections of a process that has died.
func (n *node) shut() {
	n.dying = true
	n.serving = false
	for _, t := range n.order {
		h := n.tcp[t]
		h.ep.Abort()
		n.speak(h)
	}
}

// images are the server's connections as a dump finds them, and where they stand.
func (n *node) image() (socks []*served, cuts []tcpwrap.Cut) {
	for _, t := range n.order {
		if h := n.tcp[t]; h.accepted && h.ep.State == tcptest.Established && !h.ep.Over() {
			socks = append(socks, &served{ep: h.ep.Image(), app: h.app})
			c := h.ep.Cut()
			c.ClientTS = 0
			cuts = append(cuts, c)
		}
	}
	return socks, cuts
}

// restoreFrom is CRIU: the connections of an image, their clocks set.
func (n *node) restoreFrom(g *generation, survivors []replay.Survivor) {
	rewound, boast := n.w.d.chance(3), n.w.d.chance(3)
	at := n.w.now
	for i, s := range g.socks {
		ts := survivors[i].TS
		clock := func() uint32 { return ts + uint32(n.w.now.Sub(at).Milliseconds()) }
		h := &served{ep: s.ep.Restored(clock, rewound, boast), app: s.app, accepted: true}
		if n.w.setup.Overruns > 0 {
			h.ep.Overrun = n.w.overrunFn
		}
		n.keep(h.ep.Tuple, h)
	}
	n.serving, n.dying = true, false
}

// wake is the kernel's window probe at the end of repair mode.
func (n *node) wake() {
	for _, t := range slices.Clone(n.order) {
		n.tcp[t].ep.Probe()
		n.speak(n.tcp[t])
	}
}

// laterOf are two readings of a timestamp clock.
func laterOf(a, b uint32) uint32 { return uint32(seqnum.Max(seqnum.Value(a), seqnum.Value(b))) }
