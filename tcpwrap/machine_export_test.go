package tcpwrap

import "fmt"

// Check answers what is wrong inside a machine: bounds that are crossed and
// sums that do not add up.
func (m *Machine) Check() error {
	ahead, embryos, mutes := 0, 0, 0
	for t, c := range m.conns {
		if c.tuple != t {
			return fmt.Errorf("connection %d is kept under another's addresses", c.id)
		}
		k, pending := c.in.kept(), 0
		for i := range c.in.ahead {
			f := &c.in.ahead[i]
			pending += len(f.data)
			if !c.in.nxt.Less(f.seq) {
				return fmt.Errorf("connection %d keeps %d, which is not ahead of %d", c.id, f.seq, c.in.nxt)
			}
			if i > 0 && (!c.in.ahead[i-1].seq.LessEq(f.seq) || !c.in.ahead[i-1].end().LessEq(f.end())) {
				return fmt.Errorf("connection %d keeps fragments out of order", c.id)
			}
		}
		if pending != c.in.pending {
			return fmt.Errorf("connection %d keeps %d octets and counts %d", c.id, pending, c.in.pending)
		}
		if k > m.limits.AheadPerConn {
			return fmt.Errorf("connection %d keeps %d of %d octets", c.id, k, m.limits.AheadPerConn)
		}
		if len(c.unacked) > maxUnacked {
			return fmt.Errorf("connection %d remembers %d records", c.id, len(c.unacked))
		}
		ahead += k
		if c.embryonic {
			embryos++
		}
		if c.muted {
			mutes++
		}
	}
	switch limit := max(m.limits.Handshakes, 1); {
	case ahead != m.ahead:
		return fmt.Errorf("connections keep %d octets, counted are %d", ahead, m.ahead)
	case ahead > m.limits.Ahead:
		return fmt.Errorf("connections keep %d of %d octets", ahead, m.limits.Ahead)
	case embryos != m.embryos || embryos > limit:
		return fmt.Errorf("%d connections without an answer, counted %d, limit %d", embryos, m.embryos, limit)
	case mutes != m.mutes || mutes > limit || len(m.muteAge) > 2*limit+16:
		return fmt.Errorf("%d muted connections in a queue of %d, counted %d, limit %d", mutes, len(m.muteAge), m.mutes, limit)
	case len(m.syns) > limit:
		return fmt.Errorf("%d handshakes, limit %d", len(m.syns), limit)
	case len(m.dials) > limit || len(m.dialAge) > 2*limit+16:
		return fmt.Errorf("%d dials in a queue of %d, limit %d", len(m.dials), len(m.dialAge), limit)
	case len(m.synAge) > 2*limit+16 || len(m.embryAge) > 2*limit+16:
		return fmt.Errorf("queues of %d and %d handshakes, limit %d", len(m.synAge), len(m.embryAge), limit)
	case m.kept > m.limits.Frozen:
		return fmt.Errorf("packets of %d octets wait, limit %d", m.kept, m.limits.Frozen)
	case !m.frozen && (m.kept != 0 || len(m.waited) != 0):
		return fmt.Errorf("%d packets wait for no dump", len(m.waited))
	}
	for i := range m.held {
		if m.held[i].until <= m.stable && !m.doubt || i > 0 && m.held[i].until < m.held[i-1].until {
			return fmt.Errorf("packet %d is held until %d, stable is %d", m.held[i].id, m.held[i].until, m.stable)
		}
	}
	return nil
}

// Protects reports whether the machine has a connection.
func (m *Machine) Protects(s *Segment) bool { return m.conns[s.Tuple] != nil }
