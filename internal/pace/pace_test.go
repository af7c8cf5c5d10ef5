package pace

import (
	"errors"
	"strings"
	"testing"
	"time"
)

var begin = time.Unix(1_000_000, 0)

// hourly is due at each full hour.
type hourly struct{}

func (hourly) Next(t time.Time) time.Time { return t.Truncate(time.Hour).Add(time.Hour) }

// taken tells a story second by second and answers when generations were taken.
func taken(p *Pacer, seconds int, log func(s int) Log, fails func(s int) bool) (at []int) {
	for s := range seconds {
		now := begin.Add(time.Duration(s) * time.Second)
		if due, _ := p.Due(now, log(s)); !due {
			continue
		}
		at = append(at, s)
		var err error
		if fails(s) {
			err = errors.New("no")
		}
		p.Taken(now, err)
	}
	return at
}

func never(int) bool { return false }
func busy(int) Log   { return Log{Records: 1, Changed: true} }
func idle(int) Log   { return Log{Records: 1} }

func TestPace(t *testing.T) {
	for _, c := range []struct {
		name    string
		plan    Plan
		seconds int
		log     func(int) Log
		fails   func(int) bool
		want    []int
	}{
		{"an interval", Plan{Interval: 10 * time.Second}, 31, busy, never, []int{0, 10, 20, 30}},
		{"only when asked", Plan{}, 10_000, busy, never, []int{0}},
		{"nothing happens", Plan{Interval: 10 * time.Second}, 1300, idle, never, []int{0, 600, 1200}},
		{"something happens at last", Plan{Interval: 10 * time.Second}, 100,
			func(s int) Log { return Log{Records: 2, Changed: s >= 55} }, never, []int{0, 60, 70, 80, 90}},
		{"failures are tried again soon", Plan{Interval: time.Minute}, 20, busy, func(s int) bool { return s < 16 }, []int{0, 8, 16}},
		{"failures of what is only asked for, too", Plan{}, 20, busy, func(s int) bool { return s < 4 }, []int{0, 2, 4}},
		{"a schedule", Plan{Schedule: hourly{}, Interval: time.Second}, 9000, idle, never,
			[]int{0, 800, 4400, 8000}}, // begin is 800 s before a full hour
		{"too much to replay", Plan{Interval: time.Hour, MaxReplay: time.Second}, 80,
			func(s int) Log { return Log{Records: uint64(s) * 1000, Changed: true} }, never, []int{0, 76, 77, 78, 79}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := taken(New(c.plan, begin), c.seconds, c.log, c.fails)
			if len(got) != len(c.want) {
				t.Fatalf("taken at %v, want %v", got, c.want)
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Fatalf("taken at %v, want %v", got, c.want)
				}
			}
		})
	}
}

// A generation before its time says why; one that fails is not tried without end
// for that reason.
func TestEarly(t *testing.T) {
	p := New(Plan{MaxReplay: time.Second}, begin)
	p.Taken(begin, nil)
	long := Log{Octets: 200 << 20, Changed: true}
	due, why := p.Due(begin.Add(time.Second), long)
	if !due || !strings.Contains(why, "would take 2.86s to replay") {
		t.Errorf("due %v, why %q", due, why)
	}
	p.Taken(begin.Add(time.Second), errors.New("no"))
	if due, _ := p.Due(begin.Add(2*time.Second), long); due {
		t.Error("a second after a failure: due again")
	}
	if due, _ := p.Due(begin.Add(3*time.Second), long); !due {
		t.Error("two seconds after a failure: not due")
	}
}
