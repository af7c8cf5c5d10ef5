package stream

import "time"

// Detector tells from the heartbeats of one node whether to suspect it. It is
// a plain value: no clock, no goroutine, not safe for concurrent use. Every
// time it is given must be at or after the one before.
//
// Silence is counted only while Tick is called: when the watching process
// itself was stopped, the time it did not see proves nothing. A suspicion is
// never more than a hint: the fence decides.
type Detector struct {
	timeout, tick time.Duration
	silence       time.Duration
	last          time.Time // of the latest Observe or Tick
	heard         bool
}

// NewDetector suspects after timeout of silence; Tick is to be called at least
// every tick. A node never heard of is not suspected.
func NewDetector(timeout, tick time.Duration) *Detector {
	return &Detector{timeout: timeout, tick: tick}
}

// Observe takes note of a heartbeat that arrived at at.
func (d *Detector) Observe(at time.Time) {
	d.heard, d.silence, d.last = true, 0, at
}

// Tick answers whether the node is to be suspected at at, and for how long it
// has been silent, as far as that was seen.
func (d *Detector) Tick(at time.Time) (suspect bool, silence time.Duration) {
	if !d.heard {
		return false, 0
	}
	// Twice a tick allows for an ordinary late wakeup; what is more was our own
	// absence.
	if gone := at.Sub(d.last); gone > 0 {
		d.silence += min(gone, 2*d.tick)
		d.last = at
	}
	return d.silence >= d.timeout, d.silence
}
