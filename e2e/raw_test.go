package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// raw is a client of redis on one plain socket of the client host, which does
// exactly what a test says. It never dials again.
type raw struct {
	w *world
	c *net.TCPConn
	r *bufio.Reader

	longer time.Duration // than patience is how long it waits
}

// dial connects and has a first answer, so that both sides are established.
func (w *world) dial() *raw {
	w.Helper()
	k := w.connect()
	w.must(k.ask("hello " + k.name()))
	return k
}

// connect connects, to whatever server there is.
func (w *world) connect() *raw {
	w.Helper()
	return w.connectTo(w.service)
}

// connectTo connects to another address of the service.
func (w *world) connectTo(addr string) *raw {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), patience)
	defer cancel()
	c, err := w.client.Dial(ctx, "tcp", addr)
	w.must(err)
	w.Cleanup(func() { _ = c.Close() })
	return newRaw(w, c)
}

func newRaw(w *world, c net.Conn) *raw {
	return &raw{w: w, c: c.(*net.TCPConn), r: bufio.NewReaderSize(c, 64<<10)}
}

// name is the client's own address, which no other client of the test has.
func (k *raw) name() string { return k.c.LocalAddr().String() }

// command is the wire form of a redis command.
func command(args ...string) []byte {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b
}

// bulk is the wire form of a string in a reply.
func bulk(s string) []byte { return fmt.Appendf(nil, "$%d\r\n%s\r\n", len(s), s) }

// send writes all of b.
func (k *raw) send(b []byte) error {
	_ = k.c.SetWriteDeadline(time.Now().Add(patience + k.longer))
	_, err := k.c.Write(b)
	return err
}

// expect reads exactly want, within patience.
func (k *raw) expect(want []byte) error {
	_ = k.c.SetReadDeadline(time.Now().Add(patience + k.longer))
	got := make([]byte, len(want))
	n, err := io.ReadFull(k.r, got)
	for i := range n {
		if got[i] != want[i] {
			return fmt.Errorf("%s: byte %d of %d is wrong: want %.60q, got %.60q", k.name(), i, len(want), want[i:], got[i:n])
		}
	}
	if err != nil {
		return fmt.Errorf("%s: after %d of %d bytes: %w", k.name(), n, len(want), err)
	}
	return nil
}

// ask sends an ECHO and compares the answer.
func (k *raw) ask(text string) error {
	if err := k.send(command("ECHO", text)); err != nil {
		return fmt.Errorf("%s: %w", k.name(), err)
	}
	return k.expect(bulk(text))
}

// quiet fails if anything has come that was not asked for.
func (k *raw) quiet() error {
	_ = k.c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	b, err := k.r.Peek(1)
	if err == nil {
		return fmt.Errorf("%s: %q too much", k.name(), b)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%s: %w", k.name(), err)
	}
	return nil
}

// ends waits for the server's end of the stream: a FIN, and no reset.
func (k *raw) ends() error {
	_ = k.c.SetReadDeadline(time.Now().Add(patience + k.longer))
	if b, err := k.r.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: want the end of the stream, got %q, %w", k.name(), b, err)
	}
	return nil
}

// noise is n bytes that follow from a seed.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// transfer is a large SET or GET in the background.
type transfer struct {
	moved atomic.Int64
	done  chan error
}

// steps is how much a transfer moves at a time.
const steps = 32 << 10

// upload sends a SET of value, slowed down to about takes.
func (k *raw) upload(key string, value []byte, takes time.Duration) *transfer {
	t := &transfer{done: make(chan error, 1)}
	go func() { t.done <- k.doUpload(t, key, value, takes) }()
	return t
}

func (k *raw) doUpload(t *transfer, key string, value []byte, takes time.Duration) error {
	nap := takes / time.Duration(len(value)/steps+1)
	if err := k.send(fmt.Appendf(nil, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", len(key), key, len(value))); err != nil {
		return err
	}
	for rest := value; len(rest) > 0; {
		n := min(steps, len(rest))
		if err := k.send(rest[:n]); err != nil {
			return fmt.Errorf("%s: upload: after %d bytes: %w", k.name(), t.moved.Load(), err)
		}
		t.moved.Add(int64(n))
		rest = rest[n:]
		time.Sleep(nap)
	}
	if err := k.send([]byte("\r\n")); err != nil {
		return err
	}
	return k.expect([]byte("+OK\r\n"))
}

// download asks for a key and compares it with want, slowed down to about
// takes. Having read stopAt bytes, if that is not 0, it reads no more until
// resume is closed.
func (k *raw) download(key string, want []byte, takes time.Duration, stopAt int64, resume <-chan struct{}) *transfer {
	t := &transfer{done: make(chan error, 1)}
	go func() { t.done <- k.doDownload(t, key, want, takes, stopAt, resume) }()
	return t
}

func (k *raw) doDownload(t *transfer, key string, want []byte, takes time.Duration, stopAt int64, resume <-chan struct{}) error {
	nap := takes / time.Duration(len(want)/steps+1)
	if err := k.send(command("GET", key)); err != nil {
		return err
	}
	if err := k.expect(fmt.Appendf(nil, "$%d\r\n", len(want))); err != nil {
		return err
	}
	for rest := want; len(rest) > 0; {
		if stopAt > 0 && t.moved.Load() >= stopAt {
			<-resume
			stopAt = 0
		}
		n := min(steps, len(rest))
		if err := k.expect(rest[:n]); err != nil {
			return fmt.Errorf("download: after %d bytes: %w", t.moved.Load(), err)
		}
		t.moved.Add(int64(n))
		rest = rest[n:]
		time.Sleep(nap)
	}
	return k.expect([]byte("\r\n"))
}

// reached waits until a transfer has moved n bytes and still goes on.
func (w *world) reached(t *transfer, n int64) {
	w.Helper()
	w.until(fmt.Sprintf("%d bytes of a transfer", n), func() bool {
		select {
		case err := <-t.done:
			w.Fatalf("the transfer is over too early: %v", err)
		default:
		}
		return t.moved.Load() >= n
	})
}

// get reads a key whole and compares it.
func (k *raw) get(key string, want []byte) error {
	if err := k.send(command("GET", key)); err != nil {
		return err
	}
	return k.expect(append(bulk(string(want)), []byte{}...))
}

// check fails the test for every error.
func (w *world) check(errs ...error) {
	w.Helper()
	for _, err := range errs {
		if err != nil {
			w.Error(err)
		}
	}
}

// longName makes a value of about n bytes that says whose it is.
func longName(s string, n int) string {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%s/%d ", s, i)
	}
	return strings.TrimSpace(b.String())
}
