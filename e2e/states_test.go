package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/lab"
)

// Connections that are in an awkward state at the checkpoint, at the failure or
// at both go on with the next byte: they share one server, one checkpoint and one
// takeover. The server (testdata/states.c) answers every line with its number,
// the sum of all octets before, the urgent octets so far and itself, so that a
// byte lost, doubled or taken for another shows in all later answers.
//
//	client 10.77.0.2 ---- bridge ---- primary, standby
//	       10.78.0.2 -- log 10.78.0.1, a hop with a smaller MTU
func TestAwkwardStates(t *testing.T) {
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			w.hop()
			server := w.serve(w.primary, w.compile("states.c"), vip, port)
			standby := w.startStandby(w.standby, "")
			w.protect(server.PID(), standby.join, "--interval", "1h")

			s := &states{world: w, control: w.talk()}
			var old, young []*story
			for _, make := range stories {
				old = append(old, make(s))
			}
			s.each("old, before the checkpoint", old, func(y *story) error { return y.before() })
			// Connections that wait to be accepted at the checkpoint, and others at
			// the failure.
			s.must(s.control.says("deaf\n", "deaf\n"))
			backlog := []*talker{s.talk(), s.talk()}
			s.must(backlog[1].send([]byte("early\n")))
			w.checkpoint(w.primary, w.standby)
			s.must(s.control.says("go\n", "gone\n"))
			for _, make := range stories {
				young = append(young, make(s))
			}
			s.each("young, before the failure", young, func(y *story) error { return y.before() })
			s.each("old, between", old, func(y *story) error { return y.between() })
			s.each("young, between", young, func(y *story) error { return y.between() })
			s.must(s.control.says("deaf\n", "deaf\n"))
			backlog = append(backlog, s.talk(), s.talk())
			s.must(backlog[3].send([]byte("early\n")))

			d.do(w, server)
			w.takenOver(w.standby, 0)
			live := time.Now()
			s.must(s.control.says("go\n", "gone\n"))
			s.must(s.read())
			s.each("old, after", old, func(y *story) error { return y.after() })
			s.each("young, after", young, func(y *story) error { return y.after() })
			for i, k := range backlog {
				if i%2 == 1 {
					w.check(k.hear("early"))
				}
				w.check(k.line("accepted"))
			}
			// Keep-alive probes of both sides had their turn when all still answers.
			time.Sleep(time.Until(live.Add(4 * time.Second)))
			s.each("old, in the end", old, func(y *story) error { return y.end() })
			s.each("young, in the end", young, func(y *story) error { return y.end() })
		})
	}
}

// states is what the stories of one world share.
type states struct {
	*world
	mu      sync.Mutex // of control
	control *talker
}

// story is what happens on one connection. before is over before the checkpoint,
// but for those that are younger, between before the failure, and after comes
// when the standby is live.
type story struct {
	name                   string
	k                      *talker
	before, between, after func() error
}

// each goes on with all stories at once.
func (s *states) each(when string, all []*story, do func(*story) error) {
	s.Helper()
	var wg sync.WaitGroup
	for _, y := range all {
		wg.Go(func() {
			start := time.Now()
			if err := do(y); err != nil {
				s.Errorf("%s, %s: %v", y.name, when, err)
			}
			if took := time.Since(start); took > time.Second {
				s.Logf("%s, %s: %.1f s", y.name, when, took.Seconds())
			}
		})
	}
	wg.Wait()
	if s.Failed() {
		s.FailNow()
	}
}

// read makes all late readers read.
func (s *states) read() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.control.says("read\n", "reading\n")
}

// end is for connections that are still open: one more line.
func (y *story) end() error {
	if y.k.closed {
		return nil
	}
	return y.k.line("the end")
}

func nothing() error { return nil }

const big = 2 << 20

var stories = []func(s *states) *story{
	// The client's window is shut and the server's send queue full.
	func(s *states) *story {
		k := s.talk(small)
		return &story{"full send queue", k, func() error {
			return errors.Join(k.line("hello"), k.order(fmt.Sprintf("flood %d\n", big)), k.still())
		}, nothing, func() error { return k.flood(big) }}
	},
	// And it reads a little in between.
	func(s *states) *story {
		k := s.talk(small)
		return &story{"send queue on the move", k, func() error {
			return errors.Join(k.order(fmt.Sprintf("flood %d\n", big)), k.still())
		}, func() error { return errors.Join(k.floodFrom(0, 100_000), k.still()) }, func() error { return k.floodFrom(100_000, big) }}
	},
	// The server has closed behind a full send queue: its FIN waits.
	func(s *states) *story {
		k := s.talk(small)
		return &story{"unacknowledged FIN", k, func() error {
			return errors.Join(k.line("hello"), k.order(fmt.Sprintf("floodclose %d\n", big)), k.still())
		}, nothing, func() error {
			err := k.flood(big)
			if _, e := k.r.ReadByte(); !errors.Is(e, io.EOF) {
				err = errors.Join(err, fmt.Errorf("after the last octet: %w", e))
			}
			k.closed = true
			return errors.Join(err, k.c.Close())
		}}
	},
	// The server does not read, and has room.
	func(s *states) *story {
		k := s.talk()
		data := noise(s.seed, big)
		return &story{"unread receive queue", k, func() error {
			return errors.Join(k.says(fmt.Sprintf("late %d\n", big), "late\n"), k.send(data[:big/2]), k.drained())
		}, func() error { return errors.Join(k.send(data[big/2:]), k.drained()) }, func() error { return k.got(data) }}
	},
	// The server does not read, and its window is shut.
	func(s *states) *story {
		k := s.talk()
		data := noise(s.seed+1, 6*big)
		sent := make(chan error, 1)
		return &story{"zero window of the server", k, func() error {
			if err := k.says(fmt.Sprintf("late %d\n", len(data)), "late\n"); err != nil {
				return err
			}
			go func() { sent <- k.send(data) }()
			return k.shut()
		}, k.shut, func() error { return errors.Join(<-sent, k.got(data)) }}
	},
	func(s *states) *story {
		k := s.talk()
		return &story{"urgent data", k, func() error {
			k.oob = "1"
			return errors.Join(k.says("urgent\n", "yes\n"), k.urgent("x", "1", "y"))
		}, func() error {
			k.oob = "12"
			return k.urgent("p", "2", "qrs")
		}, func() error {
			k.oob = "123"
			return errors.Join(k.urgent("", "3", "z"), k.says("shout\n", "abcd\n"))
		}}
	},
	func(s *states) *story {
		k := s.talk()
		return &story{"urgent data in line", k, func() error {
			return errors.Join(k.says("inline\n", "yes\n"), k.inline("x", "1", "y"))
		}, func() error { return k.inline("p", "2", "qrs") }, func() error { return k.inline("", "3", "z") }}
	},
	func(s *states) *story {
		k := s.talk()
		return &story{"cork", k, func() error { return k.order("cork\n") }, nothing,
			func() error { return k.says("uncork\n", "first second\n") }}
	},
	// What the server has set on its socket holds; and it sends keep-alive probes.
	func(s *states) *story {
		k := s.talk()
		return &story{"options and the server's keep-alive", k, func() error { return k.says("set\n", "set\n") }, nothing, func() error {
			return k.says("show\n", "timeout 23456, reno, nodelay 1, lowat 7777, keepalive 1 after 1 every 1, 4 times\n")
		}}
	},
	func(s *states) *story {
		k := s.talk()
		return &story{"the client's keep-alive", k, func() error {
			return errors.Join(k.line("hello"), k.c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 9}))
		}, nothing, nothing}
	},
	without("window scaling", "tcp_window_scaling"),
	without("SACK", "tcp_sack"),
	without("timestamps", "tcp_timestamps"),
	without("all options", "tcp_window_scaling", "tcp_sack", "tcp_timestamps"),
	// Behind a hop with a smaller MTU, which only ICMP tells of.
	func(s *states) *story {
		k := s.talk(behindHop, small)
		return &story{"smaller path MTU", k, func() error {
			return errors.Join(k.line(longName("hello", 3000)), k.order(fmt.Sprintf("flood %d\n", big)), k.still())
		}, nothing, func() error { return errors.Join(k.flood(big), k.line(longName("fits", 3900))) }}
	},
}

// without is a client whose kernel does not speak an option of TCP.
func without(what string, sysctls ...string) func(s *states) *story {
	return func(s *states) *story {
		set := func(v string) {
			for _, name := range sysctls {
				s.must(s.client.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(v), 0) }))
			}
		}
		set("0")
		defer set("1")
		k := s.talk()
		data := noise(s.seed+2, 300_000)
		return &story{"without " + what, k, func() error { return k.line("hello") }, func() error {
			return errors.Join(k.line(longName("between", 3000)), k.order(fmt.Sprintf("flood %d\n", big)), k.still())
		}, func() error {
			return errors.Join(k.flood(big), k.says(fmt.Sprintf("late %d\n", len(data)), "late\n"), k.send(data), s.read(), k.got(data))
		}}
	}
}

// talker is a client of the states server.
type talker struct {
	*raw
	n, sum uint32
	oob    string
	closed bool
}

// Where a talker dials from, and how.
func small(d *net.Dialer) {
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10) }); e != nil {
			return e
		}
		return err
	}
}

func behindHop(d *net.Dialer) { d.LocalAddr = &net.TCPAddr{IP: net.IPv4(10, 78, 0, 2)} }

func (w *world) talk(how ...func(*net.Dialer)) *talker {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	d := net.Dialer{KeepAlive: -1}
	for _, f := range how {
		f(&d)
	}
	var c net.Conn
	w.must(w.client.Do(func() (err error) { c, err = d.DialContext(ctx, "tcp", service); return err }))
	w.Cleanup(func() { _ = c.Close() })
	return &talker{raw: newRaw(w, c)}
}

// add counts octets that the server has read as lines.
func (k *talker) add(b string) {
	for i := range len(b) {
		k.sum = k.sum*31 + uint32(b[i])
	}
}

// says says something and expects the answer.
func (k *talker) says(what, answer string) error {
	if err := k.order(what); err != nil {
		return err
	}
	return k.expect([]byte(answer))
}

// order says something whose answer, if any, comes later.
func (k *talker) order(what string) error {
	k.add(what)
	return k.send([]byte(what))
}

// line sends a line and compares its answer.
func (k *talker) line(text string) error {
	if err := k.send([]byte(text + "\n")); err != nil {
		return err
	}
	return k.hear(text)
}

// hear expects the answer to a line.
func (k *talker) hear(text string) error {
	k.add(text + "\n")
	k.n++
	return k.expect(fmt.Appendf(nil, "%d %d %s %s\n", k.n, k.sum, k.oob, text))
}

// flood reads what "flood n" gives.
func (k *talker) flood(n int) error { return k.floodFrom(0, n) }

func (k *talker) floodFrom(from, to int) error {
	want := make([]byte, to-from)
	for i := range want {
		at := uint64(from + i)
		want[i] = byte(at*2654435761>>13 ^ at>>20)
	}
	return k.expect(want)
}

// got expects the receipt for what a late reader has read.
func (k *talker) got(data []byte) error {
	var sum uint32
	for _, b := range data {
		sum = sum*31 + uint32(b)
	}
	return k.expect(fmt.Appendf(nil, "got %d %d\n", len(data), sum))
}

// urgent sends a line in three pieces, the middle one urgent.
func (k *talker) urgent(before, octet, after string) error {
	if err := k.out(before, octet, after+"\n"); err != nil {
		return err
	}
	return k.hear(before + after)
}

func (k *talker) inline(before, octet, after string) error {
	if err := k.out(before, octet, after+"\n"); err != nil {
		return err
	}
	return k.hear(before + octet + after)
}

func (k *talker) out(before, octet, after string) error {
	if before != "" {
		if err := k.send([]byte(before)); err != nil {
			return err
		}
	}
	err := k.control(func(fd int) error { return unix.Sendto(fd, []byte(octet), unix.MSG_OOB, nil) })
	return errors.Join(err, k.send([]byte(after)))
}

func (k *talker) control(f func(fd int) error) error {
	rc, err := k.c.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	return errors.Join(rc.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr)
}

// steady waits until a number of the socket's own has stood still for a while.
func (k *talker) steady(what string, request uint, ok func(n int) bool) error {
	const quiet = 150 * time.Millisecond
	last, since := -1, time.Now()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var n int
		if err := k.control(func(fd int) (err error) { n, err = unix.IoctlGetInt(fd, request); return err }); err != nil {
			return err
		}
		if n != last {
			last, since = n, time.Now()
		}
		if ok(n) && time.Since(since) > quiet {
			return nil
		}
	}
	return fmt.Errorf("%s: %d octets, not steady", what, last)
}

// still waits until nothing more comes: the client's window is shut.
func (k *talker) still() error {
	return k.steady("receive queue", unix.TIOCINQ, func(n int) bool { return n > 4000 })
}

// shut waits until nothing more goes: the server's window is shut.
func (k *talker) shut() error {
	return k.steady("send queue", unix.TIOCOUTQ, func(n int) bool { return n > 0 })
}

// drained waits until the server's TCP has acknowledged all.
func (k *talker) drained() error {
	return k.steady("send queue", unix.TIOCOUTQ, func(n int) bool { return n == 0 })
}

// hop makes the log's host a router between the client's second address and the
// others, with a smaller MTU on the way back.
func (w *world) hop() {
	w.Helper()
	run := func(h *lab.Host, script string) {
		w.Helper()
		if out, err := h.Command("/bin/sh", "-ec", script).CombinedOutput(); err != nil {
			w.Fatalf("routes of %s: %v: %s", h.Name(), err, out)
		}
	}
	run(w.client, "ip addr add 10.78.0.2/24 dev eth0; ip rule add from 10.78.0.2 lookup 100; ip route add default via 10.78.0.1 dev eth0 table 100")
	run(w.logHost, `ip addr add 10.78.0.1/24 dev eth0
		for f in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$f/send_redirects; echo 0 >/proc/sys/net/ipv4/conf/$f/rp_filter; done
		echo 1 >/proc/sys/net/ipv4/ip_forward
		ip route add 10.78.0.2/32 dev eth0 mtu 1200`)
	run(w.primary, "ip route add 10.78.0.0/24 via 10.77.0.5")
	run(w.standby, "ip route add 10.78.0.0/24 via 10.77.0.5")
}
