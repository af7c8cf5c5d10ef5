package stream

import "time"

// This file opens the pure parts of the log to the simulator (internal/sim),
// which runs them against a log of its own. A Writer, a Reader and Acquire run
// the very same machines.

// Core is a Writer without its network: see machine.
type Core struct{ m *machine }

// NewCore begins behind fence; stable is the last position before it and newest
// the batch that holds it. An acknowledgement is waited for ackTime.
func NewCore(fence Fence, stable Position, newest StreamSeq, ackTime time.Duration, maxBacklog int, now time.Time) *Core {
	return &Core{newMachine(fence, stable, newest, ackTime, maxBacklog, now)}
}

// DoKind is what a Core wants done.
type DoKind uint8

// What a Core wants done.
const (
	DoWait      = DoKind(actWait)    // nothing until Do.Until or an event
	DoGather    = DoKind(actGather)  // the same
	DoConnect   = DoKind(actConnect) // close what connection there is and make one
	DoReadFence = DoKind(actFence)   // read the newest fence
	DoRead      = DoKind(actRead)    // read the message Do.Seq
	DoPublish   = DoKind(actPublish) // append Do.Data under Do.If
	DoStable    = DoKind(actStable)  // tell Do.UpTo
	DoEnd       = DoKind(actEnd)     // close, tell Do.Err
)

// Conditions of an append, 0 for none: the stream's last sequence, and that of the newest
// fence.
type Conditions struct{ LastSeq, LastFence StreamSeq }

// Do is one thing to be done.
type Do struct {
	Kind   DoKind
	Until  time.Time
	Seq    StreamSeq
	Number uint64 // of the batch to be published
	Data   []byte // good until the batch is acknowledged
	If     Conditions
	UpTo   Position
	Err    error
}

// Step says what to do at now.
func (c *Core) Step(now time.Time) Do {
	a := c.m.step(now)
	d := Do{Kind: DoKind(a.kind), Until: a.until, Seq: a.seq, UpTo: a.upTo, Err: a.err}
	if a.batch != nil {
		only := a.batch.conditions(c.m.fence)
		d.Number, d.Data, d.If = a.batch.num, a.batch.buf, Conditions{only.lastSeq, only.lastFence}
	}
	return d
}

// Append is Writer.Append.
func (c *Core) Append(p Position, r Record) error { return c.m.append(p, r) }

// Acked is the answer that a batch was stored as seq.
func (c *Core) Acked(now time.Time, number uint64, seq StreamSeq) { c.m.acked(now, number, seq) }

// Rejected is the answer that a batch was not stored.
func (c *Core) Rejected(now time.Time, number uint64, err error) { c.m.rejected(now, number, err) }

// Lost says that the connection is gone, or that an operation on it failed.
func (c *Core) Lost(now time.Time, err error) { c.m.lost(now, err) }

// Connected answers DoConnect.
func (c *Core) Connected(now time.Time) { c.m.connected(now) }

// FenceRead answers DoReadFence.
func (c *Core) FenceRead(now time.Time, f Fence) { c.m.fenceRead(now, f) }

// MessageRead answers DoRead with the message, or that there is none.
func (c *Core) MessageRead(now time.Time, there, ofData bool, data []byte) {
	what, h := foundNothing, header{}
	if there {
		what, h = look(ofData, data)
	}
	c.m.seqRead(now, what, h.epoch, h.number)
}

// Hint says that somebody may have fenced us.
func (c *Core) Hint(now time.Time) { c.m.hint(now) }

// Fence is Writer.Fence.
func (c *Core) Fence() Fence { return c.m.fence }

// Next is Writer.Next.
func (c *Core) Next() Position { return c.m.next }

// Stable is Writer.Stable.
func (c *Core) Stable() Position { return c.m.stable }

// State is Writer.State.
func (c *Core) State() WriterState { return c.m.state() }

// SeqOf is Writer.SeqOf.
func (c *Core) SeqOf(p Position) (StreamSeq, bool) { return c.m.seqOf(p) }

// Newest is the newest data batch known, which no purge may drop, and Trim makes
// SeqOf forget what a purge does: see Writer.Purge.
func (c *Core) Newest() StreamSeq { return c.m.newest }

// Trim is Newest's companion.
func (c *Core) Trim(before StreamSeq) { c.m.index.trim(before) }

// Claim is Acquire without its network.
type Claim struct {
	c claim
	t tail
}

// NewClaim is AcquireIf, with the nonce that tells our fence from others.
func NewClaim(node string, prev StreamSeq, nonce [16]byte) *Claim {
	return &Claim{c: claim{node: node, prev: &prev, nonce: nonce}}
}

// Newest takes the newest fence. The answer is the fence to be appended if that
// at its Prev is still the newest, or ours when it is there already.
func (c *Claim) Newest(cur Fence, now time.Time) (f Fence, stored bool, err error) {
	step, f, err := c.c.newest(cur, now)
	if err == nil && step == claimTail {
		c.t = tailOf(f)
	}
	return f, step == claimTail, err
}

// Stored takes the place of the fence that was appended.
func (c *Claim) Stored(f Fence, seq StreamSeq) {
	f.Seq = seq
	c.c.mine = f
	c.t = tailOf(f)
}

// Look is the message to be looked at next, 0 when there is no batch before the
// fence.
func (c *Claim) Look() (seq StreamSeq, fence bool) { return c.t.seq, c.t.fence() }

// TookFence takes that message, a fence.
func (c *Claim) TookFence(f Fence) { c.t.tookFence(f) }

// TookBatch takes that message, a batch, and reports whether it is the one.
func (c *Claim) TookBatch(data []byte) (last Position, found bool, err error) {
	h, err := decodeHeader(data)
	if err != nil {
		return 0, false, err
	}
	return c.t.tookBatch(h)
}

// Fence is ours, once stored.
func (c *Claim) Fence() Fence { return c.c.mine }

// Follow is a Reader without its network.
type Follow struct{ f follower }

// NewFollow begins where the fence of epoch is in force.
func NewFollow(epoch Epoch) *Follow { return &Follow{follower{epoch: epoch}} }

// Fence takes the next message, a fence.
func (r *Follow) Fence(x Fence) (Entry, error) {
	if err := r.f.fence(x); err != nil {
		return Entry{}, err
	}
	return Entry{Epoch: x.Epoch, Pos: r.f.pos, Seq: x.Seq, Fence: &x}, nil
}

// Batch takes the next message, a batch; there is no entry of a stale one.
func (r *Follow) Batch(data []byte, seq StreamSeq, each func(Entry)) error {
	b, err := DecodeBatch(data)
	if err != nil {
		return err
	}
	stale, err := r.f.batch(&b, seq)
	if err != nil || stale {
		return err
	}
	for i, rec := range b.Records {
		each(Entry{Epoch: b.Epoch, Pos: b.First + Position(i), Seq: seq, Rec: rec})
	}
	return nil
}
