// Package roles decides who ought to be what: when a standby has reason to fence
// the primary, and what becomes of a primary whose tenure ends. Like the other
// machines of the protocol it has no goroutine, no clock and no socket, so that
// internal/node and the simulator (internal/sim) run the very same decisions.
package roles

import (
	"fmt"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// What a node calls itself in its heartbeats.
const (
	Primary = "primary"
	Standby = "standby"
)

// BeatEvery is how often a primary's heartbeat goes out; a standby's goes half
// as often.
const (
	BeatEvery        = 20 * time.Millisecond
	StandbyBeatEvery = 2 * BeatEvery
)

const (
	// logAway is the silence after which one's own heartbeat shows that the log's
	// server was away, and spareTime what a primary gets to find it again.
	logAway = 5 * StandbyBeatEvery
	// longAway is a silence that no load explains. A shorter one spares the primary
	// only once: on a loaded host they come one after the other, and a dead
	// primary would be spared for ever.
	longAway = 2 * time.Second
	// A connection attempt that the outage swallowed takes a second to fail.
	spareTime = 3 * time.Second
	// unheardTime is what a primary gets that this standby has not heard of yet: it
	// may have to find the log again, which began with us.
	unheardTime = 5 * time.Second
)

// Judge tells a standby whether there is reason to take over. Its answers are
// hints and nothing more: the fence decides who is the primary. It is a plain
// value, not safe for concurrent use. Every time it is given must be at or after
// the one before, but for those of heartbeats, which may have waited a little.
type Judge struct {
	self         string
	detect, tick time.Duration

	detector *stream.Detector
	owner    string    // of the newest fence
	watching string    // node the detector listens to
	heardAt  time.Time // when watching was last heard of
	ownAt    time.Time // when our own heartbeat last came back from the log's server
	spare    time.Time // until then nobody is suspected: the log's server was away, or the primary is new
	unheard  bool      // that is only for the new primary's first heartbeat
	hiccup   bool      // it was away for a moment since the primary was last heard of
	cutOff   bool      // the link here is down
}

// NewJudge makes the judge of the standby self, which suspects after detect of
// silence and is asked at least every tick.
func NewJudge(self string, detect, tick time.Duration) *Judge {
	return &Judge{self: self, detect: detect, tick: tick, detector: stream.NewDetector(detect, tick)}
}

// Beat takes note of any node's heartbeat, one's own too.
func (j *Judge) Beat(role, node string, at time.Time) {
	if role == Primary && node == j.owner {
		if j.watching != node {
			j.watching = node
			j.detector = stream.NewDetector(j.detect, j.tick)
		}
		j.detector.Observe(at)
		j.heardAt, j.hiccup = at, false
		if j.unheard { // it lives, so its silence from here on means something
			j.spare, j.unheard = time.Time{}, false
		}
	}
	if role == Standby && node == j.self {
		if gap := at.Sub(j.ownAt); gap > longAway || gap > logAway && !j.hiccup {
			j.spare, j.hiccup, j.unheard = at.Add(spareTime), true, false
		}
		j.ownAt = at
	}
}

// Fence takes note of a fence in the log, read at at.
func (j *Judge) Fence(owner string, at time.Time) {
	j.owner = owner
	if j.watching != "" { // its first heartbeat is still to come
		j.spare, j.unheard = at.Add(spareTime), true
	}
}

// Link takes note that the link here has failed or is back. While it is down it
// is we who are cut off: to fence the primary then would end a service that
// nobody else can give. Once it is back the primary gets time to be heard, since
// its connections were waiting ever longer to try again.
func (j *Judge) Link(up bool, at time.Time) {
	j.cutOff = !up
	if up {
		j.spare, j.unheard = at.Add(spareTime), false
	}
}

// HeardAt is when the primary was last heard of; zero for never.
func (j *Judge) HeardAt() time.Time { return j.heardAt }

// Situation is what the log says.
type Situation struct {
	Epoch    stream.Epoch // of the newest fence; 0: there never was a primary
	Usable   bool         // a generation is here, and the log leads from it to the present
	Released bool         // the primary of this epoch ended protection on purpose
	Exited   bool         // its server is gone though its host lives
	Offered  bool         // it holds everything back and waits for us to take over
	Awaited  bool         // the log's newest record is so young that clients may still be waiting
}

// Reason says why this node should take over now, and since when the primary has
// been silent; "" when it should not.
func (j *Judge) Reason(now time.Time, s Situation) (why string, since time.Time) {
	if !s.Usable || s.Released || s.Epoch == 0 {
		return "", now
	}
	if s.Exited {
		return "the server process has died", now
	}
	if s.Offered {
		return "the primary hands over", now
	}
	if j.watching == "" {
		return j.neverHeard(now, s)
	}
	if now.Before(j.spare) {
		j.detector.Observe(now)
	}
	// Our own heartbeats take the same way: when they do not arrive either, it is
	// the log's server that is silent, and nobody can tell about the primary.
	suspect, silence := j.detector.Tick(now)
	if suspect && !j.cutOff && now.After(j.spare) && j.ownAt.After(j.heardAt.Add(j.detect/2)) {
		return fmt.Sprintf("no heartbeat of the primary for %v", silence.Round(time.Millisecond)), now.Add(-silence)
	}
	return "", now
}

// neverHeard is the answer about a primary that was gone before this standby began:
// every host that could have seen it die is gone, too. An old log is no reason to
// bring its service back, unasked.
func (j *Judge) neverHeard(now time.Time, s Situation) (why string, since time.Time) {
	ours := !j.ownAt.IsZero() && now.Sub(j.ownAt) < logAway
	if !s.Awaited || j.cutOff || !ours || !now.After(j.spare.Add(unheardTime-spareTime)) {
		return "", now
	}
	return fmt.Sprintf("no heartbeat of the primary since this standby began, %v ago", unheardTime), now.Add(-unheardTime)
}
