package tcpwrap

import (
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// timeWait is how long TIME_WAIT lasts: Linux's TCP_TIMEWAIT_LEN.
const timeWait = 60 * time.Second

// maxLate bounds the connections that are remembered in TIME_WAIT; Linux bounds
// its own (tcp_max_tw_buckets) in the same manner, by forgetting.
const maxLate = 16384

// Late is a connection that had ended before a takeover, and whose server's TCP
// was in TIME_WAIT: the new primary's kernel knows nothing of it.
type Late struct {
	Tuple stream.FourTuple
	Nxt   seqValue  // the octet after the client's FIN
	Since time.Time // of its end
}

type lateConn struct {
	nxt   seqValue
	until time.Time
}

// Linger has the machine answer for connections in TIME_WAIT that TCP does not
// have. It is for a machine that begins after a takeover.
func (m *Machine) Linger(list []Late) {
	for _, l := range list {
		if m.conns[l.Tuple] == nil && len(m.late) < maxLate {
			m.late[l.Tuple] = lateConn{l.Nxt, l.Since.Add(timeWait)}
		}
	}
}

// lingers answers a client's late segment as TCP in TIME_WAIT does (RFC 9293,
// 3.10.7.8 and RFC 1337): everything that is not a new connection's gets an
// acknowledgement, so that a client whose FIN was never answered can close. The
// timestamp is the one that the client has seen last, which it cannot refuse. It
// reports whether the segment was dealt with.
func (m *Machine) lingers(now time.Time, id PacketID, s *Segment) bool {
	if len(m.late) == 0 {
		return false
	}
	l, yes := m.late[s.Tuple]
	if !yes {
		return false
	}
	if now.After(l.until) || s.Flags.Has(SYN) && (l.nxt.Less(s.Seq) || s.Options.HasTS) {
		delete(m.late, s.Tuple) // RFC 6191: the addresses may be used again
		return false
	}
	m.Ready.Decide(id, Drop)
	switch {
	case s.Flags.Has(RST):
		if s.Seq == l.nxt {
			delete(m.late, s.Tuple)
		}
	case s.Len() == 0 && s.Seq == l.nxt: // the last acknowledgement once more
	case m.doubt || !s.Flags.Has(ACK): // it is repeated
	default:
		m.Ready.Send(Outgoing{
			Tuple: s.Tuple, Seq: s.Ack, Ack: l.nxt, Flags: ACK,
			HasTS: s.Options.HasTS, TSVal: s.Options.TSEcr, TSEcr: s.Options.TSVal,
		})
	}
	return true
}
