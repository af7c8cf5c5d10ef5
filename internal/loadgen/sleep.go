package loadgen

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

const (
	kindSleep = "sleep"
	// dialling is how many sleepers connect, or wake up, at a time: thousands at
	// once would only show how long the server's accept queue is.
	dialling = 64
	// sleepBuffer is small because there are thousands of them.
	sleepBuffer = 512
)

// sleepLane is one connection that says something at its beginning and at the
// end of the run, and nothing in between.
type sleepLane struct {
	addr string
	gate chan struct{}
	rng  *rand.Rand
	name string
	m    *meter
}

func (l *sleepLane) run(ctx context.Context, stop <-chan struct{}) {
	for life := 1; ; life++ {
		err := l.live(ctx, stop, fmt.Sprintf("%s.%d", l.name, life))
		if err == nil || aborted(ctx) {
			return
		}
		l.m.reset(err)
		if !pause(ctx, stop, redialPause) {
			return
		}
	}
}

// live is the life of one connection; nil when the run is over.
func (l *sleepLane) live(ctx context.Context, stop <-chan struct{}, key string) error {
	c, r, err := l.begin(ctx, key)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	// What comes unasked, the end above all, is noticed when it comes.
	ended := make(chan error, 1)
	go func() { _, err := r.Peek(1); ended <- err }()
	select {
	case err := <-ended:
		if err == nil {
			l.m.mismatch("%d bytes that were not asked for", r.Buffered())
			return nil
		}
		return err
	case <-ctx.Done():
		_ = c.Close()
		<-ended
		return ctx.Err()
	case <-stop:
	}
	l.gate <- struct{}{}
	defer func() { <-l.gate }()
	x := &rawLane{rng: l.rng, m: l.m, conn: c, r: r}
	sent := make(chan error, 1)
	op := op{[]any{"ECHO", key + "!"}, key + "!"}
	go func() { _, err := c.Write(appendCommand(nil, op.args)); sent <- err }()
	if err := <-ended; err != nil { // the first byte of the reply is there
		_ = c.Close()
		<-sent
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	start := time.Now()
	err = x.expect(appendReply(nil, op), "ECHO at the end")
	if errors.Is(err, errWrong) { // counted
		return nil
	}
	if err == nil {
		l.m.done(start, 1)
	}
	return err
}

// begin connects and has a first answer.
func (l *sleepLane) begin(ctx context.Context, key string) (net.Conn, *bufio.Reader, error) {
	select {
	case l.gate <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	defer func() { <-l.gate }()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", l.addr)
	if err != nil {
		return nil, nil, err
	}
	x := &rawLane{rng: l.rng, m: l.m, conn: c, r: bufio.NewReaderSize(c, sleepBuffer)}
	if err := x.exchange([]op{{[]any{"ECHO", key}, key}}, 0); err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return c, x.r, nil
}
