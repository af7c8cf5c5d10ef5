package loadgen

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

const (
	// step is how many bytes a transfer moves at a time.
	step = 32 << 10
	// halfWait is the longest a half-sent command waits for its other half.
	halfWait = time.Second
	// reads is how many downloads there are of one upload of the same value.
	reads = 4
)

// errWrong ends a connection whose reply was wrong (and counted as mismatch):
// what follows on it means nothing. It is no reset.
var errWrong = errors.New("wrong reply")

// rawLane is one connection that speaks the protocol by itself, so as to be in
// the middle of something most of the time.
type rawLane struct {
	addr  string
	kind  string
	size  int           // of a transfer
	takes time.Duration // what a transfer is slowed down to
	rng   *rand.Rand
	name  string
	m     *meter

	conn net.Conn
	r    *bufio.Reader
	// sleep returns at once when the run is over, so that the transfer under
	// way is still completed, and checked, but quickly.
	sleep func(time.Duration)
}

func (l *rawLane) run(ctx context.Context, stop <-chan struct{}) {
	l.sleep = func(d time.Duration) { pause(ctx, stop, d) }
	for life := 1; ; life++ {
		err := l.live(ctx, stop, fmt.Sprintf("%s.%d", l.name, life))
		if err == nil || aborted(ctx) {
			return
		}
		if !errors.Is(err, errWrong) {
			l.m.reset(err)
		}
		if !pause(ctx, stop, redialPause) {
			return
		}
	}
}

// live is the life of one connection; nil when the run is over.
func (l *rawLane) live(ctx context.Context, stop <-chan struct{}, key string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", l.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	l.conn, l.r = c, bufio.NewReaderSize(c, step)
	// One small exchange first: the connection is established on both sides.
	if err := l.exchange([]op{{[]any{"ECHO", key}, key}}, 0); err != nil {
		return err
	}
	mod := newModel(l.rng, key)
	var p pattern
	for n := 0; ; n++ {
		switch l.kind {
		case "half":
			ops := mod.pipeline()
			err = l.exchange(ops, time.Duration(l.rng.Int64N(int64(halfWait))))
		case "upload":
			p = pattern(l.rng.Uint64())
			if err = l.upload(key, p, l.takes); err == nil {
				err = l.download(key, p, 0)
			}
		default:
			if n%reads == 0 {
				p = pattern(l.rng.Uint64())
				err = l.upload(key, p, 0)
			}
			if err == nil {
				err = l.download(key, p, l.takes)
			}
		}
		if err != nil {
			return err
		}
		if !pause(ctx, stop, 0) {
			return nil
		}
	}
}

// exchange sends commands, with a wait at a random place of their bytes, and
// compares the replies.
func (l *rawLane) exchange(ops []op, wait time.Duration) error {
	var req, want []byte
	for _, o := range ops {
		req = appendCommand(req, o.args)
		want = appendReply(want, o)
	}
	if wait > 0 {
		cut := 1 + l.rng.IntN(len(req)-1)
		if _, err := l.conn.Write(req[:cut]); err != nil {
			return fmt.Errorf("send first half: %w", err)
		}
		req = req[cut:]
		l.sleep(wait)
	}
	start := time.Now()
	sent := make(chan error, 1)
	// Concurrently: the server need not read on while its replies are not read.
	go func() {
		_, err := l.conn.Write(req)
		sent <- err
	}()
	err := l.expect(want, fmt.Sprint(ops[0].args[0], " and so on"))
	if err != nil {
		_ = l.conn.Close() // so that the sender ends
	}
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	l.m.done(start, len(ops))
	return nil
}

// expect reads exactly want.
func (l *rawLane) expect(want []byte, what string) error {
	got := make([]byte, min(len(want), step))
	for off := 0; off < len(want); {
		part := got[:min(len(got), len(want)-off)]
		n, err := io.ReadFull(l.r, part)
		l.m.checked(n)
		if exp := want[off : off+n]; !bytes.Equal(part[:n], exp) {
			i := 0
			for part[i] == exp[i] {
				i++
			}
			l.m.mismatch("%s: byte %d of %d: want %s, got %s", what, off+i, len(want), short(string(exp[i:])), short(string(part[i:n])))
			return errWrong
		}
		if err != nil {
			return fmt.Errorf("read reply to %s: %w", what, err)
		}
		off += n
	}
	return nil
}

// steps calls f for each part of a transfer, spread over takes.
func (l *rawLane) steps(takes time.Duration, f func(off, n int) error) error {
	nap := takes / time.Duration((l.size+step-1)/step)
	for off := 0; off < l.size; off += step {
		if err := f(off, min(step, l.size-off)); err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", off, l.size, err)
		}
		if nap > 0 {
			l.sleep(nap)
		}
	}
	return nil
}

// upload sets the key to l.size bytes of the pattern.
func (l *rawLane) upload(key string, p pattern, takes time.Duration) error {
	head := fmt.Sprintf("*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", len(key), key, l.size)
	if _, err := io.WriteString(l.conn, head); err != nil {
		return fmt.Errorf("upload: %w", err)
	}
	buf := make([]byte, step)
	err := l.steps(takes, func(off, n int) error {
		p.fill(buf[:n], off)
		start := time.Now()
		if _, err := l.conn.Write(buf[:n]); err != nil {
			return err
		}
		l.m.sent(start)
		return nil
	})
	if err != nil {
		return fmt.Errorf("upload: %w", err)
	}
	start := time.Now()
	if _, err := io.WriteString(l.conn, "\r\n"); err != nil {
		return fmt.Errorf("upload: %w", err)
	}
	if err := l.expect([]byte("+OK\r\n"), "upload"); err != nil {
		return err
	}
	l.m.completed(start)
	return nil
}

// download gets the key and compares it with the pattern.
func (l *rawLane) download(key string, p pattern, takes time.Duration) error {
	start := time.Now()
	if _, err := l.conn.Write(appendCommand(nil, []any{"GET", key})); err != nil {
		return fmt.Errorf("download: %w", err)
	}
	if err := l.expect(fmt.Appendf(nil, "$%d\r\n", l.size), "download"); err != nil {
		return err
	}
	l.m.received(start)
	buf := make([]byte, step)
	err := l.steps(takes, func(off, n int) error {
		start := time.Now()
		got, err := io.ReadFull(l.r, buf[:n])
		l.m.checked(got)
		if i := p.check(buf[:got], off); i >= 0 {
			l.m.mismatch("download: byte %d of %d is wrong", i, l.size)
			return errWrong
		}
		if err != nil {
			return err
		}
		l.m.received(start)
		return nil
	})
	if err != nil {
		return fmt.Errorf("download: %w", err)
	}
	start = time.Now()
	if err := l.expect([]byte("\r\n"), "download"); err != nil {
		return err
	}
	l.m.completed(start)
	return nil
}
