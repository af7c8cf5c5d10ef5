//go:build !linux || (!amd64 && !arm64)

package north

import (
	"errors"
	"time"
)

// Recorder needs Linux on amd64 or arm64.
type Recorder struct{}

var errMachine = errors.New("recording of reads is for Linux on amd64 and arm64")

// Open fails.
func Open(string) (*Recorder, error) { return nil, errMachine }

// Attach fails.
func (*Recorder) Attach([]uint16) error { return errMachine }

// Add fails.
func (*Recorder) Add(uint16) error { return errMachine }

// Wake fails.
func (*Recorder) Wake(bool) error { return errMachine }

// Wait does nothing.
func (*Recorder) Wait(time.Duration) {}

// Drain does nothing.
func (*Recorder) Drain(func(Event)) {}

// Lost is 0.
func (*Recorder) Lost() uint64 { return 0 }

// Close does nothing.
func (*Recorder) Close() error { return nil }
