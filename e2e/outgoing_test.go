package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
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
	w.servers = append(w.servers, &server{p, w.logHost, "redis-server", syscall.SIGKILL})
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

// startRelay starts a proxy on the primary that dials the back end from an
// address.
func (w *world) startRelay(from string) *server {
	w.Helper()
	return w.serve(w.primary, w.compile("relay.c"), vip, port, "10.77.0.5", port, from)
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
			relay := w.startRelay(vip)
			standby := w.startStandby(w.standby, "")
			w.protect(relay.PID(), standby.join, "--interval", "1h", "--outgoing", backend)
			l := w.startLoad(busy)
			var counters []*counter
			for i := range 3 {
				counters = append(counters, w.startCounter(fmt.Sprint("count", i)))
			}
			w.checkpoint(w.primary, w.standby)
			// These, and their connections to the back end, are younger than the image.
			churn := w.startChurn(4)
			young := w.dial()
			counters = append(counters, w.startCounter("young"))
			w.somewhen(time.Second)
			d.do(w, relay)
			died := time.Now()
			w.takenOver(w.standby, 0)
			l.past(died)
			w.check(young.quiet(), young.ask("still here"), w.dial().ask("a new one"))
			churn.finish(died)
			for _, c := range counters {
				c.finish()
			}
			l.finish()
		})
	}
}

// Connections to a back end that nobody asked to protect, or that come from an
// address which stays behind, are named in time, and end in the restored proxy
// with an error rather than in silence.
func TestUnprotectedOutgoing(t *testing.T) {
	for _, c := range []struct {
		name, from, remedy string
		args               []string
	}{
		{"not named", vip, "--outgoing 10.77.0.5/32:6379", nil},
		{"another address", "10.77.0.3", "have the server open it from " + vip, []string{"--outgoing", backend}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.startBackend()
			relay := w.startRelay(c.from)
			standby := w.startStandby(w.standby, "")
			if c.args == nil { // the log is in this network
				a := w.tryProtect(relay.PID(), standby.join, "--outgoing", "10.77.0.0/24")
				a.exits(exitcode.Config)
				w.says(a, "the log at 10.77.0.4:4222")
			}
			protect := w.protect(relay.PID(), standby.join, append(c.args, "--interval", "1h")...)
			k := w.dial()
			w.checkpoint(w.primary, w.standby)
			s := w.untilStatus(w.primary, "it names the connection", func(s control.Status) bool { return s.Outgoing != nil && s.Outgoing.Others > 0 })
			if u := s.Outgoing.Unprotected; len(u) == 0 || u[0].Remote != backend || !strings.Contains(u[0].Remedy, c.remedy) {
				t.Errorf("status names %+v, want %s and %q", u, backend, c.remedy)
			}
			if _, out, _ := w.cli(w.primary, "check", "--pid", strconv.Itoa(relay.PID())); !strings.Contains(out, "--outgoing 10.77.0.5/32:6379") {
				t.Errorf("check does not say how to protect the connection to the back end:\n%s", out)
			}
			w.until("protect warns of it", func() bool { return strings.Contains(protect.said(), c.remedy) })
			relay.kill(w)
			w.takenOver(w.standby, s.Outgoing.Others)
			if err := k.end(); err != nil {
				t.Error(err)
			}
			if c.from == vip {
				w.check(w.dial().ask("through a new connection"))
			} else if err := w.connect().end(); err != nil { // it cannot dial from there any more, and lives
				t.Error(err)
			}
		})
	}
}

// end waits for the end of a connection, which must not be silence.
func (k *raw) end() error {
	_ = k.c.SetReadDeadline(time.Now().Add(patience))
	b, err := k.r.ReadByte()
	if err == nil {
		return fmt.Errorf("%s: %q too much", k.name(), b)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s: nothing came for %v", k.name(), patience)
	}
	return nil
}
