package node

import (
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// expireIdle takes connections out of protection that were idle for longer than
// the service allows.
func (p *primary) expireIdle(now time.Time) {
	if p.svc.IdleExpiry == 0 {
		return
	}
	var gone []stream.FourTuple
	p.drv.with(func() { gone = p.drv.machine.Expire(now, p.svc.IdleExpiry) })
	for _, t := range gone {
		p.log.Warn("connection no longer protected: it was idle for too long, and a takeover will reset it", "event", "expired", "conn", t, "idle_expiry", p.svc.IdleExpiry.String())
	}
}
