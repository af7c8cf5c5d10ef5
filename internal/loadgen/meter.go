package loadgen

import (
	"fmt"
	"sync"
	"time"
)

// maxErrors bounds the described errors of one connection.
const maxErrors = 8

// meter counts for one connection. Its methods may be called concurrently.
type meter struct {
	started time.Time // of the run

	mu       sync.Mutex
	res      ConnResult
	progress time.Time // start of the latest wait that ended well
}

func newMeter(id int, kind string, started time.Time, samples int) *meter {
	return &meter{started: started, res: ConnResult{ID: id, Kind: kind, Samples: newSamples(samples)}}
}

// done notes n requests answered together, asked for at start.
func (m *meter) done(start time.Time, n int) {
	took := time.Since(start)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.res.Requests += int64(n)
	m.waited(start, took, true)
	m.alive(start)
}

// noWait is what a part of a transfer takes that was in the kernel's buffer
// already, or went there: it is no latency of the server's.
const noWait = time.Millisecond

// completed notes a transfer whose last part was waited for since start.
func (m *meter) completed(start time.Time) {
	m.received(start)
	m.mu.Lock()
	m.res.Requests++
	m.mu.Unlock()
}

// received notes a part of a transfer, waited for since start.
func (m *meter) received(start time.Time) {
	took := time.Since(start)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waited(start, took, took > noWait)
	m.alive(start)
}

// sent notes a part handed to the kernel, which proves nothing about the other
// side.
func (m *meter) sent(start time.Time) {
	took := time.Since(start)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waited(start, took, took > noWait)
}

// waited is called with mu held.
func (m *meter) waited(start time.Time, took time.Duration, sample bool) {
	if sample {
		m.res.Samples.add(start.Sub(m.started).Microseconds(), took.Microseconds())
	}
	if us := took.Microseconds(); us > m.res.StallUS {
		m.res.StallUS, m.res.StallAt = us, start.Round(0)
	}
}

// alive is called with mu held.
func (m *meter) alive(start time.Time) {
	if start.After(m.progress) {
		m.progress = start
	}
}

// checked notes received bytes. They are compared before the request is done.
func (m *meter) checked(n int) {
	m.mu.Lock()
	m.res.BytesChecked += int64(n)
	m.mu.Unlock()
}

func (m *meter) mismatch(format string, args ...any) {
	m.mu.Lock()
	m.res.Mismatches++
	m.note("mismatch: " + fmt.Sprintf(format, args...))
	m.mu.Unlock()
}

func (m *meter) reset(err error) {
	m.mu.Lock()
	m.res.Resets++
	m.note("reset: " + err.Error())
	m.mu.Unlock()
}

// note is called with mu held.
func (m *meter) note(s string) {
	if len(m.res.Errors) < maxErrors {
		m.res.Errors = append(m.res.Errors, time.Since(m.started).Round(time.Millisecond).String()+": "+s)
	}
}

// snapshot returns the counts without samples, and the latest progress.
func (m *meter) snapshot() (ConnResult, time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.res
	r.Samples = Samples{}
	return r, m.progress
}

func (m *meter) result() ConnResult {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.res
}
