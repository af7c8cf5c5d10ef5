package roles

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

const (
	tick   = 5 * time.Millisecond
	detect = 100 * time.Millisecond
)

// tale is a standby's life, told in milliseconds.
type tale struct {
	*Judge
	now       time.Time
	from, own bool // heartbeats of the primary, and our own, arrive
	at        Situation
	why       string
}

func newTale() *tale {
	t := &tale{Judge: NewJudge("b", detect, tick), now: time.Unix(1000, 0), at: Situation{Epoch: 1, Usable: true}}
	t.Fence("a", t.now)
	t.from, t.own = true, true
	return t
}

// pass lets time go by; it ends early when there is reason to take over.
func (t *tale) pass(d time.Duration) (reasonAfter time.Duration) {
	for past := tick; past <= d; past += tick {
		t.now = t.now.Add(tick)
		if t.from && past%BeatEvery == 0 {
			t.Beat(Primary, "a", t.now)
		}
		if t.own && past%StandbyBeatEvery == 0 {
			t.Beat(Standby, "b", t.now)
		}
		if t.why, _ = t.Reason(t.now, t.at); t.why != "" {
			return past
		}
	}
	return -1
}

func TestJudge(t *testing.T) {
	const never = -1
	for _, c := range []struct {
		name     string
		tell     func(*tale) time.Duration
		min, max time.Duration // of the answer
	}{
		{"a primary that is heard of", func(s *tale) time.Duration {
			return s.pass(time.Minute)
		}, never, never},
		{"a silent one", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from = false
			return s.pass(time.Minute)
		}, detect, detect + 2*BeatEvery},
		{"one that was never heard of", func(s *tale) time.Duration {
			s.from = false
			return s.pass(time.Minute)
		}, never, never},
		{"one that was never heard of, and its clients may be waiting", func(s *tale) time.Duration {
			s.from, s.at.Awaited = false, true
			return s.pass(time.Minute)
		}, unheardTime, unheardTime + 2*detect},
		{"one that is heard of just in time", func(s *tale) time.Duration {
			s.from, s.at.Awaited = false, true
			s.pass(unheardTime - detect)
			s.from = true
			return s.pass(time.Minute)
		}, never, never},
		{"one that was never heard of, and neither are we", func(s *tale) time.Duration {
			s.from, s.own, s.at.Awaited = false, false, true
			return s.pass(time.Minute)
		}, never, never},
		{"nothing at all arrives: it is the log's server", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from, s.own = false, false
			return s.pass(time.Minute)
		}, never, never},
		{"the log's server is back after a while, and the primary is not", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from, s.own = false, false
			s.pass(10 * time.Second)
			s.own = true
			return s.pass(time.Minute)
		}, spareTime, spareTime + 2*detect},
		{"both are back in time", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from, s.own = false, false
			s.pass(10 * time.Second)
			s.own = true
			s.pass(spareTime - detect)
			s.from = true
			return s.pass(time.Minute)
		}, never, never},
		{"hiccups of the log spare a dead primary only once", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from = false
			begin := s.now
			for range 50 { // each long enough to be noticed, none to be believed
				s.own = false
				s.pass(logAway + 2*tick)
				s.own = true
				if s.pass(2*StandbyBeatEvery) >= 0 {
					break
				}
			}
			return s.now.Sub(begin)
		}, detect, spareTime + time.Second},
		{"our own link is down", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from = false
			s.Link(false, s.now)
			return s.pass(time.Minute)
		}, never, never},
		{"our own link was down, and the primary has time to be heard", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from = false
			s.Link(false, s.now)
			s.pass(10 * time.Second)
			s.Link(true, s.now)
			return s.pass(time.Minute)
		}, spareTime, spareTime + 2*detect},
		{"the server has died: nothing to wait for", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.at.Exited = true
			return s.pass(time.Minute)
		}, tick, tick},
		{"the primary hands over: nothing to wait for", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.at.Offered = true
			return s.pass(time.Minute)
		}, tick, tick},
		{"it hands over to one that has nothing to take over with", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.at.Offered, s.at.Usable = true, false
			return s.pass(time.Minute)
		}, never, never},
		{"the primary said goodbye", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from, s.at.Released = false, true
			return s.pass(time.Minute)
		}, never, never},
		{"there is nothing to take over with", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from, s.at.Usable, s.at.Exited = false, false, true
			return s.pass(time.Minute)
		}, never, never},
		{"there never was a primary", func(s *tale) time.Duration {
			s.at.Epoch, s.at.Exited = 0, true
			return s.pass(time.Minute)
		}, never, never},
		{"a new primary gets time for its first heartbeat", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.from = false
			s.Fence("c", s.now)
			return s.pass(time.Minute)
		}, spareTime, spareTime + 2*detect},
		{"one that was heard of and dies at once gets no more", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.Fence("a", s.now) // its agent was started again
			s.pass(2 * BeatEvery)
			s.from = false
			return s.pass(time.Minute)
		}, detect - BeatEvery, detect + 2*BeatEvery},
		{"a heartbeat does not end the time for a log's server that was away", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.own, s.from = false, false
			s.pass(10 * time.Second)
			s.own, s.from = true, true
			s.Fence("a", s.now)
			s.pass(5 * StandbyBeatEvery)
			s.from = false
			return s.pass(time.Minute)
		}, spareTime - 5*StandbyBeatEvery, spareTime + 2*detect},
		{"heartbeats of the old primary count for nothing", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.Fence("c", s.now)
			return s.pass(time.Minute) // a goes on, c is never heard of
		}, spareTime, spareTime + 2*detect},
		{"we were stopped ourselves: what we did not see proves nothing", func(s *tale) time.Duration {
			s.pass(5 * time.Second)
			s.now = s.now.Add(time.Hour)
			return s.pass(time.Minute)
		}, never, never},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTale()
			got := c.tell(s)
			if got < c.min || got > c.max {
				t.Fatalf("after %v (%q), want from %v to %v", got, s.why, c.min, c.max)
			}
		})
	}
}

func TestReasonSaysSinceWhen(t *testing.T) {
	s := newTale()
	s.pass(5 * time.Second)
	last := s.HeardAt()
	s.from = false
	s.pass(time.Minute)
	why, since := s.Reason(s.now, s.at)
	if !strings.Contains(why, "heartbeat") || since.Sub(last).Abs() > tick {
		t.Fatalf("%q since %v, last heard of at %v", why, since, last)
	}
}

func TestEndings(t *testing.T) {
	fenced := fmt.Errorf("append: %w", stream.ErrFenced)
	broken := errors.New("the packet queue failed")
	for _, c := range []struct {
		name string
		got  Ending
		want Ending
	}{
		{"fenced", AfterEnd(fenced), Leave},
		{"the queue failed", AfterEnd(broken), Close},
		{"closed", AfterEnd(stream.ErrClosed), Close},
		{"goodbye is stable", AfterGoodbye(nil), Release},
		{"fenced before goodbye was stable", AfterGoodbye(fenced), Leave},
		{"nobody knows", AfterGoodbye(errors.Join(broken, stream.ErrUnreachable)), Close},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", c.name, c.got, c.want)
		}
	}
}
