package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// churnRuns is how often the churn is repeated, each way and with each server.
func churnRuns(t *testing.T) int {
	s := os.Getenv("FTCKPT_E2E_CHURN_RUNS")
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("FTCKPT_E2E_CHURN_RUNS: want a positive number, not %q", s)
	}
	return n
}

// Connections opened and closed all the time, most of them younger than the
// generation, both ways of making them again, at a random moment of a random
// failure: every byte is right, and none is reset.
func TestChurn(t *testing.T) {
	for _, how := range ways {
		for _, s := range []struct {
			name  string
			serve func(w *world) *server
			visit func(w *world, name string, rng *rand.Rand) (visitor, error)
		}{
			{"redis", func(w *world) *server { return w.startRedis(w.primary) }, visitRedis},
			{"mangle", func(w *world) *server { return w.serve(w.primary, w.compile("mangle.c"), vip, port) }, visitMangle},
		} {
			for i := range churnRuns(t) {
				t.Run(fmt.Sprintf("%s/%s/%d", how, s.name, i), func(t *testing.T) {
					w := newWorld(t)
					server := s.serve(w)
					standby := w.startStandby(w.standby, "", "--recreate", how)
					w.protect(server.PID(), standby.join, "--interval", []string{"300ms", "1s", "1h"}[w.rng.IntN(3)])
					stop := make(chan struct{})
					var guests []*guest
					for i := range 12 {
						g := &guest{done: make(chan error, 1)}
						guests = append(guests, g)
						rng := rand.New(rand.NewPCG(w.seed, uint64(i)))
						go func() { g.done <- g.stay(w, fmt.Sprint("guest", i), rng, i < 4, s.visit, stop) }()
					}
					w.checkpoint(w.primary, w.standby)
					w.somewhen(time.Second)
					d := deaths[w.rng.IntN(len(deaths))]
					d.do(w, server)
					died := time.Now()
					w.takenOver(w.standby, 0)
					visits := 0
					for _, g := range guests {
						w.until("everybody goes on", func() bool {
							last := g.last.Load()
							return last > died.UnixNano() || len(g.done) > 0
						})
					}
					close(stop)
					for _, g := range guests {
						if err := <-g.done; err != nil {
							t.Error(err)
						}
						visits += int(g.visits.Load())
					}
					t.Logf("death of the %s; %d connections, %d translated in the end", d.name, visits, w.translated(w.standby))
				})
			}
		}
	}
}

// visitor is one connection that checks every answer.
type visitor interface {
	ask(rng *rand.Rand) error
	leave(rng *rand.Rand) error
}

type redisVisitor struct {
	*raw
	name string
	n    int
}

func visitRedis(w *world, name string, _ *rand.Rand) (visitor, error) {
	k, err := w.tryConnect(nil)
	return &redisVisitor{raw: k, name: name}, err
}

func (v *redisVisitor) ask(rng *rand.Rand) error {
	v.n++
	value := longName(fmt.Sprint(v.name, v.n), 1+rng.IntN(1<<rng.IntN(15)))
	key := v.name + v.raw.name()
	return errors.Join(v.send(command("SET", key, value)), v.expect([]byte("+OK\r\n")), v.get(key, []byte(value)))
}

func (v *redisVisitor) leave(rng *rand.Rand) error {
	if rng.IntN(2) == 0 { // the server closes first
		return v.quit()
	}
	return v.c.Close()
}

func (v *redisVisitor) quit() error {
	return errors.Join(v.send(command("QUIT")), v.expect([]byte("+OK\r\n")), v.over(), v.c.Close())
}

type mangleVisitor struct {
	*raw
	state uint32
}

func visitMangle(w *world, _ string, _ *rand.Rand) (visitor, error) {
	k, err := w.tryConnect(nil)
	return &mangleVisitor{k, 2166136261}, err
}

// mangled is what the server makes of b.
func (v *mangleVisitor) mangled(b []byte) []byte {
	out := slices.Clone(b)
	for i, c := range b {
		out[i] = c ^ byte(v.state>>24)
		v.state = (v.state ^ uint32(c)) * 16777619
	}
	return out
}

func (v *mangleVisitor) ask(rng *rand.Rand) error {
	b := noise(rng.Uint64(), 1+rng.IntN(1<<rng.IntN(16)))
	return errors.Join(v.send(b), v.expect(v.mangled(b)))
}

func (v *mangleVisitor) leave(rng *rand.Rand) error {
	switch rng.IntN(3) {
	case 0: // a last request, whose answer comes after the client's end
		b := noise(rng.Uint64(), 1+rng.IntN(5000))
		return errors.Join(v.send(b), v.c.CloseWrite(), v.expect(v.mangled(b)), v.over(), v.c.Close())
	case 1:
		return errors.Join(v.c.SetLinger(0), v.c.Close())
	}
	return v.c.Close()
}

// over wants the other side's end of the connection.
func (k *raw) over() error {
	_ = k.c.SetReadDeadline(time.Now().Add(patience))
	if b, err := k.r.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: want the end, got %q, %w", k.name(), b, err)
	}
	return nil
}

// guest is somebody who comes again and again, or stays.
type guest struct {
	done         chan error
	last, visits atomic.Int64
}

func (g *guest) stay(w *world, name string, rng *rand.Rand, stays bool, visit func(*world, string, *rand.Rand) (visitor, error), stop <-chan struct{}) error {
	for {
		v, err := visit(w, name, rng)
		if err != nil {
			return fmt.Errorf("%s: connection %d: %w", name, g.visits.Load(), err)
		}
		for n := rng.IntN(8); stays || n > 0; n-- {
			began := time.Now()
			if err := v.ask(rng); err != nil {
				return fmt.Errorf("%s: connection %d: %w", name, g.visits.Load(), err)
			}
			g.last.Store(began.UnixNano())
			select {
			case <-stop:
				stays, n = false, 0
			case <-time.After(time.Duration(rng.IntN(4)) * time.Millisecond):
			}
		}
		if err := v.leave(rng); err != nil {
			return fmt.Errorf("%s: the end of connection %d: %w", name, g.visits.Load(), err)
		}
		g.visits.Add(1)
		select {
		case <-stop:
			return nil
		case <-time.After(3 * time.Millisecond):
		}
	}
}

// tryConnect connects, from a certain address if one is given.
func (w *world) tryConnect(from *net.TCPAddr) (*raw, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var k *raw
	err := w.client.Do(func() error {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
			return errors.Join(err, cerr)
		}}
		if from != nil {
			d.LocalAddr = from
		}
		c, err := d.DialContext(ctx, "tcp", w.service)
		if err == nil {
			k = newRaw(w, c)
		}
		return err
	})
	return k, err
}

// A client's port that is used again within one interval: the second connection,
// and the third, survive as the first would have, however the ones before ended.
func TestPortUsedAgain(t *testing.T) {
	for i, how := range []string{"auto", "translate"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "", "--recreate", how)
			old := w.dialAt(40_000) // in the image, and ended after it
			w.protect(redis.PID(), standby.join, "--interval", "1h")
			w.must(old.ask("old"))
			w.checkpoint(w.primary, w.standby)
			ends := map[string]func(k *raw) error{
				"reset":           func(k *raw) error { return errors.Join(k.c.SetLinger(0), k.c.Close()) },
				"by the server":   func(k *raw) error { return (&redisVisitor{raw: k}).quit() },
				"after a request": func(k *raw) error { return errors.Join(k.ask("last"), k.c.SetLinger(0), k.c.Close()) },
			}
			w.must(ends["by the server"](old))
			last := map[string]*raw{"old": w.dialAt(40_000)}
			at := 40_001
			for name, end := range ends {
				k := w.dialAt(at)
				for n := range 3 {
					w.must(k.send(command("INCR", name)))
					w.must(k.expect(fmt.Appendf(nil, ":%d\r\n", n+1)))
					w.must(end(k))
					k = w.dialAt(at)
				}
				last[name] = k
				at++
			}
			d := deaths[i]
			d.do(w, redis)
			w.takenOver(w.standby, 0)
			for name, k := range last {
				w.check(k.quiet(), k.ask("it is me"))
				if name != "old" {
					w.check(k.send(command("INCR", name)), k.expect([]byte(":4\r\n")))
				}
			}
		})
	}
}

// dialAt is dial from a certain port.
func (w *world) dialAt(port int) *raw {
	w.Helper()
	var k *raw
	w.until("the port is free again", func() bool { // the last acknowledgement is on its way
		var err error
		k, err = w.tryConnect(&net.TCPAddr{IP: net.ParseIP("10.77.0.2"), Port: port})
		if err != nil && !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.EADDRINUSE) {
			w.Fatal(err)
		}
		return err == nil
	})
	w.Cleanup(func() { _ = k.c.Close() })
	w.must(k.ask("hello"))
	return k
}
