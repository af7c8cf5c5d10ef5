package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/e2e/packet"
)

// packetAddr is the address of the scripts, which no kernel of the lab has.
const packetAddr = "10.77.0.20"

// What clients see on the wire, segment by segment, whatever becomes of the
// server: every script of testdata/packet, in the language of package packet.
// All run at once, each on connections of its own.
//
// FTCKPT_PACKET names those to run, as "endings/*".
func TestPackets(t *testing.T) {
	pattern := os.Getenv("FTCKPT_PACKET")
	if pattern == "" {
		pattern = "*/*"
	}
	files, err := filepath.Glob("testdata/packet/" + pattern + ".txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no script matches %s (%v)", pattern, err)
	}
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			server := w.serve(w.primary, w.packetServer(), service)
			standby := w.startStandby(w.standby, "")
			w.protect(server.PID(), standby.join, "--interval", "1h")
			w.runScripts(files, func() { d.do(w, server) })
		})
	}
}

// The same of connections that are younger than the generation, when they are made
// again by translation.
func TestPacketsTranslated(t *testing.T) {
	var files []string
	for _, pattern := range []string{"*/*young*", "handshake/*"} {
		more, err := filepath.Glob("testdata/packet/" + pattern + ".txt")
		if err != nil || len(more) == 0 {
			t.Fatalf("no script matches %s (%v)", pattern, err)
		}
		files = append(files, more...)
	}
	w := newWorld(t)
	server := w.serve(w.primary, w.packetServer(), service)
	standby := w.startStandby(w.standby, "", "--recreate", "translate")
	w.protect(server.PID(), standby.join, "--interval", "1h")
	w.runScripts(files, func() { w.must(w.primary.Kill()) })
}

// packetServer builds the scripts' server.
func (w *world) packetServer() string {
	w.Helper()
	bin := filepath.Join(w.lab.Dir(), "packetserver")
	cmd := exec.CommandContext(w.Context(), "go", "build", "-buildvcs=false", "-trimpath", "-o", bin, "./packet/server")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Fatalf("build the server of the packet scripts: %v\n%s", err, out)
	}
	return bin
}

// stage is where scripts wait for each other: a phase begins when all scripts
// have come to it, to a later one, or to their end.
type stage struct {
	mu      sync.Mutex
	running int
	waiting map[packet.Phase][]chan error
	moved   chan struct{} // a token for each change
}

func (s *stage) await(p packet.Phase) error {
	c := make(chan error, 1)
	s.mu.Lock()
	s.waiting[p] = append(s.waiting[p], c)
	s.mu.Unlock()
	s.signal()
	return <-c
}

func (s *stage) signal() {
	select {
	case s.moved <- struct{}{}:
	default:
	}
}

func (s *stage) leave() {
	s.mu.Lock()
	s.running--
	s.mu.Unlock()
	s.signal()
}

// next waits until all scripts that go on wait for a phase, and answers the
// first of these; ok is false when none is left.
func (s *stage) next() (p packet.Phase, ok bool) {
	for range s.moved {
		s.mu.Lock()
		waiting, first := 0, packet.Again
		for p, l := range s.waiting {
			if len(l) > 0 {
				waiting += len(l)
				first = min(first, p)
			}
		}
		running := s.running
		s.mu.Unlock()
		switch {
		case running == 0:
			return 0, false
		case waiting == running:
			return first, true
		}
	}
	return 0, false
}

// release lets the scripts that wait for a phase go on.
func (s *stage) release(p packet.Phase) {
	s.mu.Lock()
	list := s.waiting[p]
	delete(s.waiting, p)
	s.mu.Unlock()
	for _, c := range list {
		c <- nil
	}
}

// abandon makes all scripts that wait fail: the world has.
func (s *stage) abandon() {
	for {
		s.mu.Lock()
		for _, list := range s.waiting {
			for _, c := range list {
				c <- errors.New("the world failed before that")
			}
		}
		clear(s.waiting)
		running := s.running
		s.mu.Unlock()
		if running == 0 {
			return
		}
		<-s.moved
	}
}

// runScripts runs scripts in a world that is protected, with a standby.
func (w *world) runScripts(files []string, die func()) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 4*patience)
	defer cancel()
	wire, err := packet.Open(w.client, netip.MustParseAddr(packetAddr), netip.MustParseAddrPort(service))
	w.must(err)
	defer wire.Close()
	w.must(wire.Resolve(ctx))

	var scripts []*packet.Script
	for _, f := range files {
		s, err := packet.Load(f)
		w.must(err)
		s.Name = strings.TrimSuffix(strings.TrimPrefix(f, "testdata/packet/"), ".txt")
		scripts = append(scripts, s)
	}
	st := &stage{running: len(scripts), waiting: map[packet.Phase][]chan error{}, moved: make(chan struct{}, 1)}
	results := make([]error, len(scripts))
	took := make([]time.Duration, len(scripts))
	var all sync.WaitGroup
	for i, s := range scripts {
		all.Go(func() {
			defer st.leave()
			begun := time.Now()
			results[i] = packet.Run(ctx, wire, s, uint16(packet.FirstPort+i*packet.MaxConns), st.await)
			took[i] = time.Since(begun)
		})
	}
	defer all.Wait()
	defer func() { // also when the world has failed
		cancel()
		st.abandon()
	}()
	for {
		p, ok := st.next()
		if !ok {
			break
		}
		switch p {
		case packet.Checkpoint:
			w.checkpoint(w.primary, w.standby)
		case packet.Takeover:
			die()
		case packet.Live:
			w.takenOver(w.standby, 0)
		case packet.Again:
			w.checkpoint(w.standby, nil)
		}
		st.release(p)
	}
	var table strings.Builder
	for i, s := range scripts {
		verdict := "ok"
		if results[i] != nil {
			verdict = "FAILED"
			w.Errorf("%v", results[i])
		}
		fmt.Fprintf(&table, "%-40s %-6s %5.2f s\n", s.Name, verdict, took[i].Seconds())
	}
	w.Logf("scripts:\n%s", &table)
	for _, s := range wire.Strays() {
		w.Errorf("an ICMP message for no script: %s", s)
	}
}
