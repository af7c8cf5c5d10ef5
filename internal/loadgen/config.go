package loadgen

import (
	"errors"
	"fmt"
	"time"
)

// Config is what a run does. It is the first line of Main's input, as JSON.
type Config struct {
	Addr string `json:"addr"` // of the server, literal
	Seed uint64 `json:"seed"` // the same seed sends the same bytes

	// Numbers of connections of each kind.
	Redis    int `json:"redis"`
	Idle     int `json:"idle"`
	Upload   int `json:"upload"`
	Download int `json:"download"`
	Half     int `json:"half"`
	Sleep    int `json:"sleep"`

	// PaceUS is the mean time a redis connection waits between requests, in
	// microseconds; 0 is none.
	PaceUS int64 `json:"pace_us"`
	// TransferBytes is the size of an upload or download; 0 is 4 MB.
	TransferBytes int `json:"transfer_bytes"`
	// TransferUS is how long one such transfer is made to take, in
	// microseconds; 0 is 4 s.
	TransferUS int64 `json:"transfer_us"`
	// GraceUS bounds how long requests under way at the end may still take,
	// in microseconds; 0 is 30 s. After it their connections count as reset.
	GraceUS int64 `json:"grace_us"`
	// MaxSamples bounds the latencies kept per connection; 0 is 20000.
	MaxSamples int `json:"max_samples"`
}

// Limits of what a Config may ask for.
const (
	maxConnections   = 10_000
	maxTransferBytes = 256 << 20
	maxSamples       = 1 << 20
)

// Connections is the number of connections the run opens.
func (c Config) Connections() int { return c.Redis + c.Idle + c.Upload + c.Download + c.Half + c.Sleep }

// withDefaults fills in zero values and refuses what cannot be meant.
func (c Config) withDefaults() (Config, error) {
	if c.TransferBytes == 0 {
		c.TransferBytes = 4 << 20
	}
	if c.TransferUS == 0 {
		c.TransferUS = (4 * time.Second).Microseconds()
	}
	if c.GraceUS == 0 {
		c.GraceUS = (30 * time.Second).Microseconds()
	}
	if c.MaxSamples == 0 {
		c.MaxSamples = 20_000
	}
	switch {
	case c.Addr == "":
		return c, errors.New("check load: no address")
	case min(c.Redis, c.Idle, c.Upload, c.Download, c.Half, c.Sleep) < 0, c.Connections() < 1, c.Connections() > maxConnections:
		return c, fmt.Errorf("check load: %d connections, want 1 to %d", c.Connections(), maxConnections)
	case c.TransferBytes < 1 || c.TransferBytes > maxTransferBytes:
		return c, fmt.Errorf("check load: transfers of %d bytes, want 1 to %d", c.TransferBytes, maxTransferBytes)
	case c.MaxSamples < 2 || c.MaxSamples > maxSamples:
		return c, fmt.Errorf("check load: %d samples, want 2 to %d", c.MaxSamples, maxSamples)
	case min(c.PaceUS, c.TransferUS, c.GraceUS) < 0:
		return c, errors.New("check load: a time is negative")
	}
	return c, nil
}
