package stream

import (
	"fmt"
	"time"
)

// claim is one node's try to become primary, without its network: what to make
// of the newest fence, and how to find the last position before our own. Its
// nonce tells it whether a publish without an answer was stored.
type claim struct {
	node  string
	prev  *StreamSeq // fence only if this is the newest fence (0: there is none); nil: in any case
	nonce [16]byte
	mine  Fence // once stored
}

// claimStep is what a claim wants next.
type claimStep uint8

const (
	claimPublish claimStep = iota + 1 // append fence if the newest one is still at fence.Prev
	claimTail                         // the fence is ours: walk back from it
)

// newest takes the newest fence, the zero Fence when there is none.
func (c *claim) newest(cur Fence, now time.Time) (claimStep, Fence, error) {
	switch {
	case cur.Nonce == c.nonce && cur.Seq != 0:
		c.mine = cur
		return claimTail, cur, nil
	case c.mine.Seq != 0 && cur.Seq > c.mine.Seq || c.prev != nil && cur.Seq != *c.prev:
		return 0, Fence{}, fmt.Errorf("%w: %s was faster (epoch %d)", ErrFenced, cur.Node, cur.Epoch)
	}
	return claimPublish, Fence{Epoch: cur.Epoch + 1, Node: c.node, At: now, Prev: cur.Seq, Nonce: c.nonce}, nil
}

// tail steps back from a fence message by message: over fences, each of which
// names the one before it, and over what a fenced primary may have left, to the
// newest batch that counts.
type tail struct {
	f   Fence
	seq StreamSeq // to be looked at now; 0: there is no batch
}

func tailOf(f Fence) tail { return tail{f, f.Seq - 1} }

// fence reports whether the message to be looked at must be a fence.
func (t *tail) fence() bool { return t.seq == t.f.Prev }

// tookFence takes the message as the fence it is.
func (t *tail) tookFence(f Fence) { t.f, t.seq = f, t.seq-1 }

// tookBatch takes the message as a batch; it reports whether it is the one.
func (t *tail) tookBatch(h header) (last Position, found bool, err error) {
	switch inForce := t.f.Epoch - 1; {
	case h.epoch == inForce:
		return h.first + Position(h.count) - 1, true, nil
	case h.epoch > inForce:
		return 0, false, fmt.Errorf("%w log: epoch %d before the fence of %d", ErrCorrupt, h.epoch, t.f.Epoch)
	}
	t.seq--
	return 0, false, nil
}

// conditions are what must hold for a batch to be stored (JetStream's optimistic
// concurrency control): nothing has come since our last message, and the newest
// fence is ours.
type conditions struct {
	lastSeq   StreamSeq // of the stream
	lastFence StreamSeq // of the fences' subject
}

func (b *batch) conditions(f Fence) conditions { return conditions{b.exp, f.Seq} }
