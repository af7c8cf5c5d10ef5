package tcpwrap

import (
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// Expire takes connections out of protection on which neither side has said
// anything new for idle, and answers which: the log has a notice of each, and a
// takeover resets them. What they make the server do afterwards would be in no
// log, so one that speaks again waits for a generation that has it (see revive).
// Acknowledgements and keep-alives are nothing new.
func (m *Machine) Expire(now time.Time, idle time.Duration) (expired []stream.FourTuple) {
	if m.mode != Protecting || m.frozen {
		return nil
	}
	for t, c := range m.conns {
		switch {
		case c.expired || c.embryonic || c.muted:
		case c.last.IsZero():
			c.last = now
		case now.Sub(c.last) >= idle:
			c.expired = true
			m.stats.Expired++
			m.Append(stream.ConnEnd{Conn: c.id, Reason: stream.EndExpired})
			expired = append(expired, t)
		}
	}
	return expired
}

// Expired are the connections that are not protected for having been idle.
func (m *Machine) Expired() (ids []stream.ConnID) {
	for _, c := range m.conns {
		if c.expired {
			ids = append(ids, c.id)
		}
	}
	return ids
}

// revive has an expired connection protected again that speaks: nothing of it
// passes until a generation has it, under a new identity.
func (m *Machine) revive(c *conn) {
	m.forget(c)
	m.blocked[c.tuple] = notInImage
}

// news reports whether an inbound segment has octets, or a FIN, that the log
// does not have.
func (c *conn) news(s *Segment) bool {
	return !s.Flags.Has(RST) && s.Len() > 0 && c.in.nxt.Less(s.End())
}
