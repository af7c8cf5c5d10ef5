package loadgen

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Result is what a run saw.
type Result struct {
	Seed    uint64    `json:"seed"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended"`

	Connections  int   `json:"connections"`
	Requests     int64 `json:"requests"`      // answered and compared
	BytesChecked int64 `json:"bytes_checked"` // received, all compared
	Mismatches   int64 `json:"mismatches"`
	Resets       int64 `json:"resets"`
	StallUS      int64 `json:"stall_us"` // the longest any connection waited

	Conns []ConnResult `json:"conns"`
}

// ConnResult is what one connection saw.
type ConnResult struct {
	ID           int       `json:"id"`
	Kind         string    `json:"kind"`
	Requests     int64     `json:"requests"`
	BytesChecked int64     `json:"bytes_checked"`
	Mismatches   int64     `json:"mismatches"`
	Resets       int64     `json:"resets"`
	StallUS      int64     `json:"stall_us"` // longest wait for a reply or for a transfer to move
	StallAt      time.Time `json:"stall_at"` // when that wait began
	// Errors are the first few mismatches and resets, described.
	Errors  []string `json:"errors,omitempty"`
	Samples Samples  `json:"samples"`
}

// Merge adds the connections of other, the result of another process, to r.
// Sample times of other are moved to r's start. Identical connection numbers
// are the caller's business.
func (r *Result) Merge(other Result) {
	if r.Conns == nil && r.Started.IsZero() {
		*r = other
		return
	}
	shift := other.Started.Sub(r.Started).Microseconds()
	for _, c := range other.Conns {
		at := make([]int64, len(c.Samples.AtUS))
		for i, t := range c.Samples.AtUS {
			at[i] = t + shift
		}
		c.Samples.AtUS = at
		r.Conns = append(r.Conns, c)
	}
	if other.Ended.After(r.Ended) {
		r.Ended = other.Ended
	}
	r.sum()
}

// sum computes the totals from Conns.
func (r *Result) sum() {
	r.Connections = len(r.Conns)
	r.Requests, r.BytesChecked, r.Mismatches, r.Resets, r.StallUS = 0, 0, 0, 0, 0
	for _, c := range r.Conns {
		r.Requests += c.Requests
		r.BytesChecked += c.BytesChecked
		r.Mismatches += c.Mismatches
		r.Resets += c.Resets
		r.StallUS = max(r.StallUS, c.StallUS)
	}
}

// Message is one line of Main's output.
type Message struct {
	// Event is "progress" (every 50 ms), "result" (the last) or "error".
	Event string    `json:"event"`
	Time  time.Time `json:"time"`
	// Connected counts the connections that have had a first reply.
	Connected  int   `json:"connected"`
	Requests   int64 `json:"requests"`
	Mismatches int64 `json:"mismatches"`
	Resets     int64 `json:"resets"`
	// Oldest is the earliest, over all connections, of the times at which each
	// last got something that was asked for or sent after its previous
	// progress: once it is later than a fault, every connection has survived.
	Oldest time.Time `json:"oldest"`
	Error  string    `json:"error,omitempty"`
	Result *Result   `json:"result,omitempty"`
}

// ErrNoResult is what Follow returns when the output ends without a result.
var ErrNoResult = errors.New("the load generator ended without a result")

// Follow reads Main's output to its end, passing progress to f, and returns the
// result. An "error" message is returned as an error.
func Follow(r io.Reader, f func(Message)) (Result, error) {
	d := json.NewDecoder(r)
	for {
		var m Message
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			return Result{}, ErrNoResult
		} else if err != nil {
			return Result{}, fmt.Errorf("read load generator: %w", err)
		}
		switch {
		case m.Event == "error":
			return Result{}, fmt.Errorf("generate load: %s", m.Error)
		case m.Result != nil:
			return *m.Result, nil
		default:
			f(m)
		}
	}
}
