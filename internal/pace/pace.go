// Package pace decides when the next generation is due. It has no clock and
// takes no generation: the primary's loop asks it.
package pace

import (
	"fmt"
	"time"
)

const (
	// A replay injects about so many octets and records a second on a modest host
	// (measured: 72 MB/s in small segments, 75,000 segments a second).
	replayOctets  = 70 << 20
	replayRecords = 75_000
	// restAtMost is how long a service to which nothing happens goes without a new
	// generation: its timestamp clocks are reckoned from the last one.
	restAtMost = 10 * time.Minute
	// retryAfter paces generations that fail.
	retryAfter = 2 * time.Second
)

// Schedule answers the first time after t at which a generation is due; zero for
// never.
type Schedule interface {
	Next(t time.Time) time.Time
}

// Plan is what the operator wants. The zero value wants the first generation, and
// then those that are asked for.
type Plan struct {
	Interval  time.Duration // 0: none
	Schedule  Schedule      // instead of Interval; nil: none
	MaxReplay time.Duration // a generation is due when the log would take longer to replay; 0: however long
}

// Log is what a recovery would have to replay now.
type Log struct {
	Records, Octets uint64
	Changed         bool // something happened since the newest generation's cut but that generation itself
}

// replay is about how long that takes.
func (l Log) replay() time.Duration {
	seconds := float64(l.Octets)/replayOctets + float64(l.Records)/replayRecords
	return time.Duration(seconds * float64(time.Second))
}

// Pacer is the plan under way. Not safe for concurrent use.
type Pacer struct {
	plan   Plan
	last   time.Time // when the newest generation was taken
	failed bool      // the last attempt did
	at     time.Time // the next is due; zero: not by time
}

// New makes a Pacer whose first generation is due at once.
func New(p Plan, now time.Time) *Pacer { return &Pacer{plan: p, at: now} }

// Taken takes note of a generation, or of a failed attempt at one.
func (p *Pacer) Taken(now time.Time, err error) {
	if p.failed = err != nil; p.failed {
		p.at = now.Add(max(retryAfter, min(p.plan.Interval, 4*retryAfter)))
		return
	}
	p.last = now
	p.plan.next(&p.at, now)
}

func (p *Plan) next(at *time.Time, now time.Time) {
	switch {
	case p.Schedule != nil:
		*at = p.Schedule.Next(now)
	case p.Interval > 0:
		*at = now.Add(p.Interval)
	default:
		*at = time.Time{}
	}
}

// Next is when Due has to be asked at the latest; zero when no time has come to
// matter.
func (p *Pacer) Next() time.Time { return p.at }

// Due says whether a generation is due by time, and why one is wanted before its
// time; "" when it is not. Ask it every now and then.
func (p *Pacer) Due(now time.Time, l Log) (due bool, early string) {
	if !p.at.IsZero() && !now.Before(p.at) {
		if p.last.IsZero() || p.failed || l.Changed || p.plan.Schedule != nil || now.Sub(p.last) >= restAtMost {
			return true, ""
		}
		p.plan.next(&p.at, now) // the newest generation is as good as another would be
	}
	if r := l.replay(); p.plan.MaxReplay > 0 && r > p.plan.MaxReplay && !p.failed {
		return true, fmt.Sprintf("the log behind the newest generation would take %v to replay", r.Round(10*time.Millisecond))
	}
	return false, ""
}
