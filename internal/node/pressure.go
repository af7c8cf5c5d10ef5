package node

import (
	"context"
	"errors"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

const (
	// sizeEvery is how often the log's size is asked for.
	sizeEvery = 2 * time.Second
	// moreRoom is by how many octets a full log grows, so that it can take the
	// record of the generation that lets it be collected.
	moreRoom  = 64 << 20
	growEvery = 10 * time.Second
)

// pressure watches over the room in the log: a generation is what makes some.
type pressure struct {
	asked, grown time.Time
}

// urgent says why a generation is wanted before its time, "" when it is not.
func (r *pressure) urgent(ctx context.Context, p *primary, now time.Time) string {
	if p.wantsGeneration() {
		return "connections wait for a generation before they can be protected"
	}
	if errors.Is(p.w.State().Err, stream.ErrFull) {
		if now.Sub(r.grown) < growEvery {
			return ""
		}
		r.grown = now
		p.log.Error("the log is full: clients wait; making room for a generation, behind which it can be collected", "octets", moreRoom)
		if err := p.lg.Grow(ctx, moreRoom); err != nil {
			p.log.Error("make room in the log; give the stream a higher max_bytes by hand", "err", err)
		}
		return ""
	}
	if now.Sub(r.asked) < sizeEvery {
		return ""
	}
	r.asked = now
	actx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	st, err := p.lg.Status(actx)
	if err == nil && st.MaxBytes > 0 && st.Bytes > st.MaxBytes/4*3 {
		return "the log is three quarters full"
	}
	return ""
}
