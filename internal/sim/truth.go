package sim

import (
	"bytes"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

// truth is what the log's server really holds, whatever the nodes believe. The
// promises are checked against it.
type truth struct {
	w      *World
	follow *stream.Follow
	epoch  stream.Epoch
	owner  *node // of the newest fence
	last   stream.Position
	facts  []fact // one for each client
	conns  map[stream.ConnID]int
	newest *generation
	books  []*generation // those that the newest primary has to keep, newest last
	exited bool
}

// fact is what the log holds of one client's connection.
type fact struct {
	conn     stream.ConnID
	open     bool
	accepted bool
	edge     seqnum.Value // next octet of the client's that is not in the log
	fin      bool
	first    seqnum.Value // the server's first octet
	app      tcptest.App
	out      []byte // what a server that has heard all that says

	// at the newest fence
	fencedEdge seqnum.Value
	fencedOut  int
	fencedFin  bool
	fencedOpen bool
}

func (t *truth) fenced(f *stream.Fence) {
	if _, err := t.follow.Fence(*f); err != nil {
		t.w.violate(3, "the log's fences: %v", err)
	}
	t.epoch, t.exited = f.Epoch, false
	for _, n := range t.w.nodes {
		if n.name == f.Node {
			t.owner = n
		}
	}
	for i := range t.facts {
		x := &t.facts[i]
		x.fencedEdge, x.fencedOut, x.fencedFin, x.fencedOpen = x.edge, len(x.out), x.fin, x.open && x.accepted
	}
}

// stored takes a batch that the server has stored.
func (t *truth) stored(n *node, data []byte, seq stream.StreamSeq) {
	fresh := false
	err := t.follow.Batch(data, seq, func(e stream.Entry) {
		fresh = true
		t.last = e.Pos
		t.apply(e.Rec)
	})
	if err != nil {
		t.w.violate(3, "the log took a batch of %s that its readers refuse: %v", n.name, err)
	}
	if !fresh {
		t.w.violate(3, "the log took a batch of %s, which is fenced", n.name)
	}
}

func (t *truth) apply(r stream.Record) {
	switch r := r.(type) {
	case stream.ConnOpen:
		i := int(r.Tuple.Client.Port()) - firstPort
		if _, twice := t.conns[r.Conn]; twice {
			t.w.violate(4, "connection %d is opened twice", r.Conn)
		}
		t.conns[r.Conn] = i
		x := &t.facts[i]
		*x = fact{conn: r.Conn, open: true, edge: r.ISN.Add(1), app: tcptest.App{Name: i}}
	case stream.ConnAccept:
		if x := t.fact(r.Conn); x != nil {
			x.accepted, x.first = true, r.ISN.Add(1)
		}
	case stream.Bytes:
		x := t.fact(r.Conn)
		if x == nil {
			return
		}
		if x.edge.Less(r.Seq) {
			t.w.violate(1, "the log lacks octets %d to %d of connection %d", x.edge, r.Seq, r.Conn)
		}
		if end := r.Seq.Add(seqnum.Size(len(r.Payload))); x.edge.Less(end) {
			x.out = x.app.AppendHears(x.out, r.Payload[r.Seq.To(x.edge):])
			x.edge = end
		}
	case stream.ClientFin:
		if x := t.fact(r.Conn); x != nil && !x.fin && r.Seq == x.edge {
			x.fin = true
			x.edge = x.edge.Add(1)
			x.out = append(x.out, tcptest.Bye...)
		}
	case stream.Generation:
		if g := t.w.manifests[r.Manifest]; g != nil {
			g.rec = r
			t.books = append(t.books, g)
			t.newest = g
		}
	case stream.ServerExit:
		t.exited = true
	}
}

func (t *truth) fact(id stream.ConnID) *fact {
	if i, ok := t.conns[id]; ok && t.facts[i].conn == id {
		return &t.facts[i]
	}
	return nil
}

// leaves holds a segment that node n, primary of epoch e, sends to a client to
// promises 1 to 4.
func (t *truth) leaves(n *node, e stream.Epoch, s *tcpwrap.Segment) {
	c := t.w.clientOf(s.Tuple)
	x := &t.facts[c.name]
	old := e < t.epoch // somebody else is the primary by now
	if s.Flags.Has(tcpwrap.RST) {
		if old && !c.over() {
			t.w.violate(3, "%s, fenced, resets client %d", n.name, c.name)
		}
		return // judged when the client believes it
	}
	if !x.open || !x.accepted {
		t.w.violate(1, "%s speaks to client %d on a connection that is not in the log", n.name, c.name)
	}
	edge, out, fin := x.edge, len(x.out), x.fin
	if old {
		if !x.fencedOpen {
			t.w.violate(3, "%s, fenced, speaks to client %d on a connection the log did not have then", n.name, c.name)
		}
		edge, out, fin = x.fencedEdge, x.fencedOut, x.fencedFin
	}
	because := func(p int) int {
		if old {
			return 3
		}
		return p
	}
	if s.Flags.Has(tcpwrap.ACK) && edge.Less(s.Ack) {
		t.w.violate(because(1), "%s (epoch %d of %d) acknowledges %d to client %d; the log has it up to %d", n.name, e, t.epoch, s.Ack, c.name, edge)
	}
	if len(s.Payload) == 0 && !s.Flags.Has(tcpwrap.FIN) || s.Flags.Has(tcpwrap.SYN) {
		return
	}
	if s.Seq.Less(x.first) { // a probe repeats an octet at most
		return
	}
	at := int(x.first.To(s.Seq))
	if at+len(s.Payload) > out {
		t.w.violate(because(2), "%s (epoch %d of %d) says octets %d to %d to client %d; what the log has makes a server say %d",
			n.name, e, t.epoch, at, at+len(s.Payload), c.name, out)
	}
	if !bytes.Equal(s.Payload, x.out[at:at+len(s.Payload)]) {
		t.w.violate(4, "%s says wrong octets to client %d from %d on", n.name, c.name, at)
	}
	if s.Flags.Has(tcpwrap.FIN) && (!fin || at+len(s.Payload) != out) {
		t.w.violate(because(2), "%s ends the conversation with client %d, which the log does not make it do", n.name, c.name)
	}
}

// lives is the newest primary's beginning: it restored g, and keeps that alone of
// what was before; the newest generation stays until there is a newer one.
func (t *truth) lives(g *generation) {
	t.books = t.books[:0]
	if g.complete(&t.w.store) && t.w.log.purged < g.rec.FromSeq {
		t.books = append(t.books, g)
	}
}

// needs holds the log and the store to have what a recovery from g needs.
func (t *truth) needs(g *generation) {
	if t.w.log.purged >= g.rec.FromSeq {
		t.w.violate(5, "generation %d needs the log from %d on, and it is purged up to %d", g.rec.ID, g.rec.FromSeq, t.w.log.purged)
	}
	for k, h := range g.chunks {
		if !t.w.store.has(h) {
			t.w.violate(5, "chunk %d of generation %d is not in the store", k, g.rec.ID)
		}
	}
	if !t.w.store.has(g.rec.Manifest) {
		t.w.violate(5, "the manifest of generation %d is not in the store", g.rec.ID)
	}
}

// check is what holds after every step.
func (t *truth) check() {
	for _, c := range t.w.clients {
		x := &t.facts[c.name]
		if c.ep.Una != c.ep.ISN && x.open && x.edge.Less(c.ep.Una) {
			t.w.violate(1, "client %d has an acknowledgement of %d; the log has it up to %d", c.name, c.ep.Una, x.edge)
		}
	}
	if t.newest != nil {
		t.needs(t.newest)
	}
	for i := max(0, len(t.books)-2); i < len(t.books); i++ {
		t.needs(t.books[i])
	}
}
