package sim

import (
	"errors"
	"fmt"

	"github.com/ftckpt/ftckpt/stream"
)

// logServer is JetStream as far as the protocol leans on it: one sequence of
// messages, appends under conditions, reads that may lag behind, and a purge.
type logServer struct {
	w        *World
	msgs     []message // the message with sequence n is msgs[n-1]
	last     int       // index+1 of the newest fence
	purged   stream.StreamSeq
	up       bool
	full     bool
	stale    int // how many messages reads may lag behind: an isolated leader answers, too
	dropNext int // so many appends are lost without an answer: a leader steps down
	conns    []*logConn
}

type message struct {
	fence *stream.Fence
	data  []byte
	gone  bool
}

type askKind uint8

const (
	askAppend askKind = iota // a batch
	askFence                 // append a fence
	askNewestFence
	askMessage
)

type ask struct {
	kind   askKind
	number uint64
	data   []byte
	cond   stream.Conditions
	fence  stream.Fence
	seq    stream.StreamSeq
}

type answer struct {
	kind   askKind
	number uint64
	seq    stream.StreamSeq
	err    error
	there  bool
	msg    message
}

// logConn is a connection of a node to the log.
type logConn struct {
	n        *node
	claiming bool // of a takeover, not of a writer
	up       []ask
	down     []answer
	closed   bool // by the node: what is on its way up may still arrive
	severed  bool // by the server: nothing more arrives either way
}

var (
	errRefused = errors.New("refused: wrong last sequence")
	errLost    = errors.New("connection lost")
	errDown    = errors.New("connection refused")
	errTimeout = errors.New("no answer")
)

func (s *logServer) connect(n *node, claiming bool) *logConn {
	c := &logConn{n: n, claiming: claiming}
	s.conns = append(s.conns, c)
	return c
}

func (s *logServer) lastSeq() stream.StreamSeq { return stream.StreamSeq(len(s.msgs)) }

// newestFence is the newest fence among the first n messages.
func (s *logServer) newestFence(n int) stream.Fence {
	if s.last > 0 && s.last <= n {
		return *s.msgs[s.last-1].fence
	}
	for i := n; i > 0; i-- {
		if f := s.msgs[i-1].fence; f != nil {
			return *f
		}
	}
	return stream.Fence{}
}

// visible is how many messages a read sees now.
func (s *logServer) visible() int {
	if s.stale > 0 {
		return max(0, len(s.msgs)-s.w.d.n(s.stale+1))
	}
	return len(s.msgs)
}

// handle answers a request; false: not at all.
func (s *logServer) handle(c *logConn, a *ask) (answer, bool) {
	r := answer{kind: a.kind, number: a.number}
	switch a.kind {
	case askNewestFence:
		r.msg.fence = new(stream.Fence)
		*r.msg.fence = s.newestFence(s.visible())
		r.there = r.msg.fence.Epoch != 0
	case askMessage:
		if int(a.seq) <= s.visible() && a.seq > 0 && !s.msgs[a.seq-1].gone {
			r.there, r.msg = true, s.msgs[a.seq-1]
		}
	case askFence:
		if s.dropNext > 0 {
			s.dropNext--
			return r, false
		}
		if int(a.fence.Prev) != s.last {
			r.err = fmt.Errorf("%w: %w", stream.ErrRefused, errRefused)
			break
		}
		f := a.fence
		s.msgs = append(s.msgs, message{fence: &f})
		s.last = len(s.msgs)
		f.Seq = s.lastSeq()
		r.seq = f.Seq
		s.w.truth.fenced(&f)
	case askAppend:
		if s.dropNext > 0 {
			s.dropNext--
			return r, false
		}
		switch {
		case s.full:
			r.err = stream.ErrFull
		case a.cond.LastSeq != 0 && a.cond.LastSeq != s.lastSeq() || a.cond.LastFence != 0 && int(a.cond.LastFence) != s.last:
			r.err = fmt.Errorf("%w: %w", stream.ErrRefused, errRefused)
		default:
			s.msgs = append(s.msgs, message{data: a.data})
			r.seq = s.lastSeq()
			s.w.truth.stored(c.n, a.data, r.seq)
		}
	}
	return r, true
}

// pumpUp lets the oldest request of a connection reach the server.
func (s *logServer) pumpUp(c *logConn) bool {
	if len(c.up) == 0 || c.severed || !s.up || c.n.cutLogUp && !c.closed {
		return false
	}
	a := c.up[0]
	c.up = c.up[1:]
	r, ok := s.handle(c, &a)
	s.w.say("log: handles %s of %s%s", askNames[a.kind], c.n.name, outcome(r, ok))
	if ok && !c.closed {
		c.down = append(c.down, r)
	}
	return true
}

var askNames = [...]string{"an append", "a fence", "a reading of the newest fence", "a reading of a message"}

func outcome(r answer, ok bool) string {
	switch {
	case !ok:
		return ": lost"
	case r.err != nil:
		return ": " + r.err.Error()
	case r.seq != 0:
		return fmt.Sprintf(": stored as %d", r.seq)
	}
	return ""
}

// pumpDown lets the oldest answer reach the node.
func (s *logServer) pumpDown(c *logConn) bool {
	if c.closed || !c.n.runs() || !c.n.agent || c.n.cutLogDown {
		return false
	}
	if c.severed {
		c.closed = true
		c.n.connLost(c)
		return true
	}
	if len(c.down) == 0 || !s.up {
		return false
	}
	r := c.down[0]
	c.down = c.down[1:]
	c.n.answered(c, &r)
	return true
}

// sweep forgets connections that nothing travels on any more.
func (s *logServer) sweep() {
	kept := s.conns[:0]
	for _, c := range s.conns {
		if !c.closed || len(c.up) > 0 && !c.severed {
			kept = append(kept, c)
		}
	}
	clear(s.conns[len(kept):])
	s.conns = kept
}

// restart cuts every connection.
func (s *logServer) restart() {
	for _, c := range s.conns {
		c.severed = true
	}
}

// purge drops the batches before seq, fences stay.
func (s *logServer) purge(before stream.StreamSeq) {
	for i := int(s.purged); i < int(before)-1 && i < len(s.msgs); i++ {
		if s.msgs[i].fence == nil {
			s.msgs[i].gone, s.msgs[i].data = true, nil
		}
	}
	s.purged = max(s.purged, before-1)
}

// read follows the log from seq on, at most k messages; it answers the next
// sequence. strict: seq itself must be there.
func (s *logServer) read(f *stream.Follow, seq stream.StreamSeq, strict bool, to stream.StreamSeq, each func(stream.Entry)) (stream.StreamSeq, error) {
	for ; seq <= to && int(seq) <= len(s.msgs); seq++ {
		m := &s.msgs[seq-1]
		if m.gone {
			if strict {
				return seq, stream.ErrPurged
			}
			continue
		}
		strict = false
		if m.fence != nil {
			e, err := f.Fence(*m.fence)
			if err != nil {
				return seq, err
			}
			each(e)
			continue
		}
		if err := f.Batch(m.data, seq, each); err != nil {
			return seq, err
		}
	}
	return seq, nil
}

// epochAt is the epoch in force at seq.
func (s *logServer) epochAt(seq stream.StreamSeq) stream.Epoch {
	return s.newestFence(min(int(seq)-1, len(s.msgs))).Epoch
}
