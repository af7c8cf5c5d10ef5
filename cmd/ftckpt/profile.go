package main

import (
	"fmt"
	"os"
	"runtime/pprof"
)

// profileVar names a file that a daemon writes its CPU profile to when it ends
// (go tool pprof). It is for making ftckpt faster, and in no help.
const profileVar = "FTCKPT_PPROF"

// profile starts a CPU profile if the environment asks for one.
func (a *app) profile() (stop func(), err error) {
	name, ok := a.env(profileVar)
	if !ok || name == "" {
		return func() {}, nil
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, fmt.Errorf("write CPU profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("write CPU profile: %w", err)
	}
	return func() {
		pprof.StopCPUProfile()
		if err := f.Close(); err != nil {
			a.log.Warn("write CPU profile", "err", err)
		}
	}, nil
}
