package demo

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// Fault is what the demo does to the service.
type Fault string

// The faults.
const (
	FaultHost    Fault = "host"    // the primary's host dies, silently
	FaultProcess Fault = "process" // the server is killed; its host and ftckpt live
	FaultLink    Fault = "link"    // the primary's link is cut; its host runs on
)

// Names of events. All but Failed are what the standby logs.
const (
	Failed   = "failed"
	Suspect  = "suspect"
	Fenced   = "fenced"
	VIPTaken = "vip-taken"
	Restored = "restored"
	Replayed = "replayed"
	Live     = "live"
)

// order is that of a takeover; events of the same instant are told in it.
var order = []string{Failed, Suspect, Fenced, VIPTaken, Restored, Replayed, Live}

// Event is one step of the fault and the takeover.
type Event struct {
	Name string    `json:"event"`
	At   time.Time `json:"time"`
}

// maxLogLine bounds a line of a log that events are read from.
const maxLogLine = 1 << 20

// ParseEvents finds the events of a takeover in a log of JSON lines (those with
// one of the names above in "event", and a "time"); other lines are skipped.
func ParseEvents(r io.Reader) ([]Event, error) {
	var out []Event
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLogLine)
	for s.Scan() {
		var e Event
		if json.Unmarshal(bytes.TrimSpace(s.Bytes()), &e) != nil || e.At.IsZero() {
			continue
		}
		if slices.Contains(order, e.Name) {
			out = append(out, e)
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	return out, nil
}

// Timeline is all that a run is told from.
type Timeline struct {
	Fault    Fault
	Seed     uint64
	Events   []Event           // by time; the first is Failed
	Takeover *control.Takeover // the standby's own measurements, if it gave any
	Takes    int               // takeovers the standby counted
	Load     loadgen.Result
}

// NewTimeline puts the fault and the events of the standby that followed it in
// order. Events before the fault (a suspicion that came to nothing) are not the
// takeover's; of each event the last counts.
func NewTimeline(fault Fault, failed time.Time, events []Event, load loadgen.Result) Timeline {
	last := map[string]time.Time{Failed: failed}
	for _, e := range events {
		if e.Name != Failed && !e.At.Before(failed) {
			last[e.Name] = e.At
		}
	}
	t := Timeline{Fault: fault, Seed: load.Seed, Load: load}
	for _, name := range order {
		if at, ok := last[name]; ok {
			t.Events = append(t.Events, Event{name, at})
		}
	}
	slices.SortStableFunc(t.Events, func(a, b Event) int { return a.At.Compare(b.At) })
	return t
}

// At is when an event was; false if it was not.
func (t Timeline) At(name string) (time.Time, bool) {
	for _, e := range t.Events {
		if e.Name == name {
			return e.At, true
		}
	}
	return time.Time{}, false
}

// Since is how long after the fault an event was.
func (t Timeline) Since(name string) (time.Duration, bool) {
	at, ok := t.At(name)
	failed, _ := t.At(Failed)
	return at.Sub(failed), ok
}

// says are the sentences of a timeline.
func (t Timeline) says(name string) string {
	switch name {
	case Failed:
		switch t.Fault {
		case FaultProcess:
			return "the server was killed (SIGKILL)"
		case FaultLink:
			return "the primary's link was cut; its host runs on"
		}
		return "the primary's host died: link cut, every process killed at once"
	case Suspect:
		if t.Fault == FaultProcess {
			return "the standby learned that the server is dead"
		}
		return "the standby noticed that the primary is silent"
	case Fenced:
		return "the log accepts nothing of the old primary any more"
	case VIPTaken:
		return "the service's address is the standby's"
	case Restored:
		return "the server's memory and sockets are back"
	case Replayed:
		return "what clients had sent since is replayed, every output compared"
	case Live:
		return "clients are answered again"
	}
	return name
}

// title is an event's name for people.
func title(name string) string {
	switch name {
	case Suspect:
		return "detected"
	case VIPTaken:
		return "address taken"
	}
	return name
}

// Summary is the object that `ftckpt demo --json` ends with. Times are in
// milliseconds.
type Summary struct {
	Requests     int64   `json:"requests"` // answered and compared
	Connections  int     `json:"connections"`
	BytesChecked int64   `json:"bytes_checked"` // received by clients, all compared
	Mismatches   int64   `json:"mismatches"`    // replies that were not what they must be
	Resets       int64   `json:"resets"`        // connections that were lost
	StallMS      float64 `json:"stall_ms"`      // the longest a client waited
	DetectMS     float64 `json:"detect_ms"`     // fault to suspicion
	RestoreMS    float64 `json:"restore_ms"`    // memory and sockets
	ReplayMS     float64 `json:"replay_ms"`     // roll forward
	Takeovers    int     `json:"takeovers"`
	Fault        Fault   `json:"fault"` // what was injected
	Seed         uint64  `json:"seed"`  // of the clients
}

// Summary sums the run up. Where the standby did not measure a step, it is
// what lies between the events.
func (t Timeline) Summary() Summary {
	s := Summary{
		Requests: t.Load.Requests, Connections: t.Load.Connections, BytesChecked: t.Load.BytesChecked,
		Mismatches: t.Load.Mismatches, Resets: t.Load.Resets, StallMS: float64(t.Load.StallUS) / 1000,
		Takeovers: t.Takes, Fault: t.Fault, Seed: t.Seed,
	}
	if d, ok := t.Since(Suspect); ok {
		s.DetectMS = ms(d)
	}
	if t.Takeover != nil {
		s.RestoreMS, s.ReplayMS = t.Takeover.RestoreMS, t.Takeover.ReplayMS
		return s
	}
	s.RestoreMS, s.ReplayMS = t.step(Restored), t.step(Replayed)
	return s
}

// step is the time from the event before, in milliseconds.
func (t Timeline) step(name string) float64 {
	for i, e := range t.Events {
		if e.Name == name && i > 0 {
			return ms(e.At.Sub(t.Events[i-1].At))
		}
	}
	return 0
}

// ms is a duration in milliseconds, with microseconds as its decimals.
func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Perfect reports whether no client noticed.
func (s Summary) Perfect() bool { return s.Mismatches == 0 && s.Resets == 0 }

// Verdict is the run in one line.
func (s Summary) Verdict() string {
	if s.Perfect() {
		return "No client noticed: " + s.facts()
	}
	return "CLIENTS NOTICED: " + s.facts()
}

func (s Summary) facts() string {
	bad := "not one wrong, not one connection lost"
	if !s.Perfect() {
		bad = plural(s.Mismatches, "reply", "replies") + " wrong, " + plural(s.Resets, "connection", "connections") + " lost"
	}
	return fmt.Sprintf("%s, %s, %s bytes checked: %s. The longest wait was %s.",
		plural(int64(s.Connections), "connection", "connections"), plural(s.Requests, "request", "requests"),
		group(s.BytesChecked), bad, human(s.StallMS))
}

// Text writes the run for people.
func (t Timeline) Text(w io.Writer) error {
	var b strings.Builder
	b.WriteString("What happened\n")
	for i, e := range t.Events {
		since, _ := t.Since(e.Name)
		took := ""
		if i > 0 {
			took = fmt.Sprintf("+%.1f ms", ms(e.At.Sub(t.Events[i-1].At)))
		}
		fmt.Fprintf(&b, "  %9.3f s %11s  %-13s  %s\n", since.Seconds(), took, title(e.Name), t.says(e.Name))
	}
	if _, ok := t.At(Live); !ok {
		b.WriteString("  there was no takeover\n")
	}
	b.WriteString("\nHow long each client waited at most\n")
	for _, c := range t.clients() {
		bar := 0
		if t.Load.StallUS > 0 {
			bar = int(30 * c.StallUS / t.Load.StallUS)
		}
		fmt.Fprintf(&b, "  %4d  %-8s  %9s  %s\n", c.ID, c.Kind, human(float64(c.StallUS)/1000), strings.Repeat("#", bar))
		for _, e := range c.Errors {
			fmt.Fprintf(&b, "        %s\n", e)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", t.Summary().Verdict())
	_, err := io.WriteString(w, b.String())
	return err
}

// clients are the connections in the order of their numbers.
func (t Timeline) clients() []loadgen.ConnResult {
	return slices.SortedFunc(slices.Values(t.Load.Conns), func(a, b loadgen.ConnResult) int { return cmp.Compare(a.ID, b.ID) })
}

// human prints milliseconds with three digits that matter.
func human(ms float64) string {
	switch {
	case ms >= 1000:
		return fmt.Sprintf("%.2f s", ms/1000)
	case ms >= 100:
		return fmt.Sprintf("%.0f ms", ms)
	case ms >= 10:
		return fmt.Sprintf("%.1f ms", ms)
	default:
		return fmt.Sprintf("%.2f ms", ms)
	}
}

// group puts a space between each three digits.
func group(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return group(n) + " " + many
}
