package e2e

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// Servers other than redis. Each keeps a running sum of the lines it got on a
// connection and answers every line with its number, the sum and itself turned
// round, so that a lost, doubled or foreign byte shows in all later answers.
func TestOtherServers(t *testing.T) {
	for _, s := range []struct {
		name string
		args func(w *world) []string
	}{
		{"c", func(w *world) []string { return []string{w.compile("lines.c"), vip, port} }},
		{"python", func(w *world) []string {
			const python = "/usr/bin/python3" // the system's: a shim would fork
			if _, err := os.Stat(python); err != nil {
				w.Skip("needs python3")
			}
			program, err := os.ReadFile("testdata/lines.py")
			w.must(err)
			return []string{python, "-c", string(program), vip, port}
		}},
	} {
		for _, d := range deaths {
			t.Run(s.name+"/"+d.name, func(t *testing.T) {
				w := newWorld(t)
				server := w.serve(w.primary, s.args(w)...)
				standby := w.startStandby(w.standby, "")
				w.protect(server.PID(), standby.join)
				var clients []*liner
				for i := range 10 {
					clients = append(clients, w.lines(i))
				}
				w.checkpoint(w.primary, w.standby)
				w.somewhen(time.Second)
				d.do(w, server)
				w.takenOver(w.standby, 0)
				for _, c := range clients {
					n := c.n.Load()
					w.until("a line client goes on", func() bool { return c.n.Load() > n+20 || len(c.done) > 0 })
				}
				for _, c := range clients {
					close(c.stop)
					w.check(<-c.done)
				}
			})
		}
	}
}

// liner is a client of a line server.
type liner struct {
	*raw
	n    atomic.Int64 // right answers
	stop chan struct{}
	done chan error
}

// lines starts a client that sends lines and checks the answers.
func (w *world) lines(i int) *liner {
	w.Helper()
	c := &liner{raw: w.connect(), stop: make(chan struct{}), done: make(chan error, 1)}
	seed := w.seed + uint64(i)
	go func() { c.done <- c.run(seed) }()
	w.until("a first answer", func() bool { return c.n.Load() > 0 || len(c.done) > 0 })
	return c
}

func (c *liner) run(seed uint64) error {
	var sum uint32
	text := noise(seed, 1<<16)
	for i := range text {
		text[i] = 'a' + text[i]%26
	}
	for n := uint32(1); ; n++ {
		select {
		case <-c.stop:
			return nil
		default:
		}
		at := int(n*7919) % (len(text) - 2000)
		line := text[at : at+1+int(n*31)%1900]
		for _, b := range line {
			sum = sum*31 + uint32(b)
		}
		if err := c.send(append(append([]byte{}, line...), '\n')); err != nil {
			return err
		}
		turned := make([]byte, len(line))
		for i, b := range line {
			turned[len(line)-1-i] = b
		}
		if err := c.expect(fmt.Appendf(nil, "%d %d %s\n", n, sum, turned)); err != nil {
			return fmt.Errorf("answer %d: %w", n, err)
		}
		c.n.Add(1)
		time.Sleep(time.Millisecond)
	}
}
