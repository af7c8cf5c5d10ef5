package stream

import "fmt"

// follower holds what comes out of a log to its rules: epochs rise from fence
// to fence, records of an older epoch than the newest fence are dropped, and
// positions have no holes. It is pure.
type follower struct {
	epoch   Epoch     // of the newest fence
	pos     Position  // of the newest record
	started bool      // pos is known
	seq     StreamSeq // of the newest message
}

// fence takes the next message, which is a fence.
func (f *follower) fence(x Fence) error {
	if x.Epoch <= f.epoch {
		return fmt.Errorf("%w log: fence %d of epoch %d comes after epoch %d", ErrCorrupt, x.Seq, x.Epoch, f.epoch)
	}
	f.epoch, f.seq = x.Epoch, x.Seq
	return nil
}

// batch takes the next message, which is a batch, and reports whether it is
// stale: written by a primary that had been fenced.
func (f *follower) batch(b *Batch, seq StreamSeq) (stale bool, err error) {
	f.seq = seq
	switch {
	case b.Epoch < f.epoch:
		return true, nil
	case b.Epoch > f.epoch:
		return false, fmt.Errorf("%w: batch %d is of epoch %d, but the newest fence is of %d", ErrHole, seq, b.Epoch, f.epoch)
	case f.started && b.First > f.pos+1:
		return false, fmt.Errorf("%w: batch %d begins at position %d, expected %d", ErrHole, seq, b.First, f.pos+1)
	case f.started && b.First <= f.pos:
		return false, fmt.Errorf("%w log: batch %d begins at position %d, behind which the log already was (%d)", ErrCorrupt, seq, b.First, f.pos)
	}
	f.pos, f.started = b.Last(), true
	return false, nil
}
