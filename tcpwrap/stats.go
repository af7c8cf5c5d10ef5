package tcpwrap

import (
	"slices"
	"time"
)

// Stats count what a Machine did since it was made.
type Stats struct {
	Connections  int    // protected now
	Holding      int    // outbound packets waiting for the log now
	Waiting      int    // packets waiting for a dump now
	Held         uint64 // outbound packets that waited for the log
	Passed       uint64 // outbound packets for which all was stable already
	LoggedBytes  uint64 // client octets logged
	Refused      uint64 // packets dropped for want of room, or of a log
	DyingDropped uint64 // FIN and RST of the dying server
	Violations   uint64 // connections quarantined: their TCP ran ahead of the log
	Expired      uint64 // connections taken out of protection for being idle
	HeldP50      time.Duration
	HeldP99      time.Duration
}

// Stats answers the counts; it sorts a little, so do not call it per packet.
func (m *Machine) Stats() Stats {
	s := m.stats
	s.Connections, s.Holding, s.Waiting = len(m.conns)-m.mutes, len(m.held), len(m.waited)
	s.HeldP50, s.HeldP99 = m.holds.quantiles()
	return s
}

// holdTimes keeps the most recent waits.
type holdTimes struct {
	ring [1024]time.Duration
	n    int
}

func (h *holdTimes) add(d time.Duration) {
	h.ring[h.n%len(h.ring)] = d
	h.n++
}

func (h *holdTimes) quantiles() (p50, p99 time.Duration) {
	n := min(h.n, len(h.ring))
	if n == 0 {
		return 0, 0
	}
	s := slices.Clone(h.ring[:n])
	slices.Sort(s)
	return s[n/2], s[n*99/100]
}
