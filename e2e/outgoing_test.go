package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
)

const backend = "10.77.0.5:" + port

// startBackend starts a redis on the log's host, behind a proxy.
func (w *world) startBackend() {
	w.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		w.Skip("needs redis-server (scripts/deps.sh test)")
	}
	p, err := w.logHost.Start(lab.Service{Name: "backend", Args: []string{"redis-server", "--port", port, "--save", "",
		"--appendonly", "no", "--protected-mode", "no", "--dir", w.logHost.Dir()}})
	w.must(err)
	w.servers = append(w.servers, &server{p, w.logHost, "redis-server"})
	w.until("the back end accepts connections", func() bool {
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		c, err := w.client.Dial(ctx, "tcp", backend)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// startRelay starts a proxy to the back end on the primary.
func (w *world) startRelay() *server {
	w.Helper()
	return w.serve(w.primary, w.compile("relay.c"), vip, port, "10.77.0.5", port)
}

// counter is a client that has the back end count, so that a request which is
// carried out twice shows, or one that is lost.
type counter struct {
	*raw
	n    atomic.Int64
	stop chan struct{}
	done chan error
}

func (w *world) startCounter(key string) *counter {
	w.Helper()
	c := &counter{raw: w.dial(), stop: make(chan struct{}), done: make(chan error, 1)}
	go func() { c.done <- c.run(key) }()
	return c
}

func (c *counter) run(key string) error {
	for n := 1; ; n++ {
		select {
		case <-c.stop:
			return nil
		default:
		}
		if err := errors.Join(c.send(command("INCR", key)), c.expect(fmt.Appendf(nil, ":%d\r\n", n))); err != nil {
			return fmt.Errorf("count %s to %d: %w", key, n, err)
		}
		c.n.Add(1)
		time.Sleep(time.Millisecond)
	}
}

// finish fails the test if the counter does not go on.
func (c *counter) finish() {
	c.w.Helper()
	n := c.n.Load()
	c.w.until("a counter goes on", func() bool { return c.n.Load() > n+20 || len(c.done) > 0 })
	close(c.stop)
	c.w.check(<-c.done)
}

// A proxy dies in the middle of its work, and its connections to the back end
// go on with those of its clients: no request is lost, none is made twice.
func TestProxy(t *testing.T) {
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			w.startBackend()
			relay := w.startRelay()
			standby := w.startStandby(w.standby, "")
			w.protect(relay.PID(), standby.join, "--interval", "1h", "--outgoing", backend)
			l := w.startLoad(busy)
			var counters []*counter
			for i := range 3 {
				counters = append(counters, w.startCounter(fmt.Sprint("count", i)))
			}
			w.checkpoint(w.primary, w.standby)
			w.somewhen(time.Second)
			d.do(w, relay)
			died := time.Now()
			w.takenOver(w.standby, 0)
			l.past(died)
			for _, c := range counters {
				c.finish()
			}
			l.finish()
		})
	}
}
