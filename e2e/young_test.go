package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// ways are how connections can be made again.
var ways = []string{"bpf", "translate"}

// Connections that are younger than the newest generation survive as well: ones
// that are silent, in the middle of a request, busy, and ones that come and go
// all the time.
func TestYoungConnections(t *testing.T) {
	for i, d := range deaths { // TestChurn has the other pairs
		how := ways[i]
		t.Run(how+"/"+d.name, func(t *testing.T) {
			w := newWorld(t)
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "", "--recreate", how)
			w.protect(redis.PID(), standby.join, "--interval", "1h")
			old := w.dial()
			w.checkpoint(w.primary, w.standby)

			churn := w.startChurn(4)
			silent, talker, half := w.dial(), w.dial(), w.dial()
			w.must(talker.send(command("SET", "young", longName("talk", 20_000))))
			w.must(talker.expect([]byte("+OK\r\n")))
			request := command("ECHO", longName("half", 500))
			w.must(half.send(request[:11]))
			l := w.startLoad(busy)
			w.must(old.ask("before"))
			w.somewhen(time.Second)
			d.do(w, redis)
			died := time.Now()
			w.must(talker.send(command("ECHO", "while nobody is there")))
			if s := w.takenOver(w.standby, 0); s.Takeover.Connections < 18 {
				t.Errorf("status: %d connections carried over, want 18 at least", s.Takeover.Connections)
			}
			w.check(
				half.send(request[11:]), half.expect(bulk(longName("half", 500))),
				talker.expect(bulk("while nobody is there")), talker.get("young", []byte(longName("talk", 20_000))),
				silent.quiet(), silent.ask("after"), old.quiet(), old.ask("after"),
				w.dial().ask("a new one"),
			)
			l.past(died)
			l.finish()
			churn.finish(died)
		})
	}
}

// churn is clients whose every connection lives for a few requests.
type churn struct {
	w       *world
	stop    chan struct{}
	clients []*churner
}

type churner struct {
	done chan error
	last atomic.Pointer[time.Time] // when the newest connection was dialled that ended well
	n    int
}

func (w *world) startChurn(n int) *churn {
	c := &churn{w: w, stop: make(chan struct{})}
	for i := range n {
		k := &churner{done: make(chan error, 1)}
		c.clients = append(c.clients, k)
		go func() { k.done <- k.run(w, fmt.Sprint("churn", i), c.stop) }()
	}
	return c
}

func (k *churner) run(w *world, name string, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		dialled := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		conn, err := w.client.Dial(ctx, "tcp", w.service)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: connection %d: %w", name, k.n, err)
		}
		r := newRaw(w, conn)
		for i := range 1 + k.n%7 {
			value := fmt.Sprintf("%d.%d", k.n, i)
			err = errors.Join(err, r.send(command("SET", name, value)), r.expect([]byte("+OK\r\n")), r.get(name, []byte(value)))
			if err != nil {
				break
			}
		}
		if err = errors.Join(err, conn.Close()); err != nil {
			return fmt.Errorf("%s: connection %d: %w", name, k.n, err)
		}
		k.n++
		k.last.Store(&dialled)
		time.Sleep(5 * time.Millisecond)
	}
}

// finish ends the clients, once each has made a connection since, and fails the
// test for an error of any.
func (c *churn) finish(since time.Time) {
	c.w.Helper()
	for _, k := range c.clients { // a SYN that was lost is sent again after a second
		c.w.until("a new connection of each client that comes and goes", func() bool {
			last := k.last.Load()
			return last != nil && last.After(since) || len(k.done) > 0
		})
	}
	close(c.stop)
	total := 0
	for _, k := range c.clients {
		if err := <-k.done; err != nil {
			c.w.Error(err)
		}
		total += k.n
	}
	c.w.Logf("churn: %d connections came and went", total)
}
