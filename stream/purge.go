package stream

import (
	"context"
	"errors"
	"fmt"
)

// purgeStep is how many messages are collected at once: appends stall for as
// long as a step takes, some 5 ms.
const purgeStep = 1000

// Purge collects the batches before seq, in steps that stall appends for a few
// milliseconds. Fences stay, and so does the newest batch, whatever seq is: it
// tells the next primary its first position.
func (w *Writer) Purge(ctx context.Context, before StreamSeq) error {
	w.purge.Lock()
	defer w.purge.Unlock()
	w.mu.Lock()
	before = min(before, w.m.newest)
	err := w.m.end
	w.mu.Unlock()
	if err != nil {
		return fmt.Errorf("purge log: %w", err)
	}
	c, err := w.log.control(ctx)
	if err != nil {
		return fmt.Errorf("purge log: %w", err)
	}
	n := &w.log.names
	if w.purged == 0 {
		m, err := c.getMsg(ctx, n.logStream, map[string]any{"next_by_subj": n.data, "seq": 1})
		if errors.Is(err, ErrMissing) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("purge log: %w", err)
		}
		w.purged = m.Seq
	}
	for w.purged < before {
		to := min(w.purged+purgeStep, before)
		// The index first: SeqOf must not name what is no longer there.
		w.mu.Lock()
		w.m.index.trim(to)
		w.mu.Unlock()
		var r struct {
			Purged uint64 `json:"purged"`
		}
		ask := map[string]any{"filter": n.data, "seq": to}
		if err := c.request(ctx, "$JS.API.STREAM.PURGE."+n.logStream, ask, &r); err != nil {
			return fmt.Errorf("purge log before %d: %w", to, err)
		}
		w.purged = to
	}
	return nil
}
