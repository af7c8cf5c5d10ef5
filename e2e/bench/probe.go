package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// probePause is between a reply and the next request: light load, and a
// stall's beginning and end are known to about as much.
const probePause = 2 * time.Millisecond

// probe is one client that asks one thing after the other and checks every
// reply: a counter of its own, which must be exactly one more each time.
type probe struct {
	conn net.Conn
	key  string
	done chan struct{}

	mu    sync.Mutex
	last  time.Time     // of the newest reply, or the start
	worst time.Duration // longest wait between replies since the last reset
	end   time.Time     // of that wait
	err   error
}

// startProbes connects n clients and waits until each has had a reply.
func startProbes(ctx context.Context, w *world, n int) (ps []*probe, stop func() error, err error) {
	stop = func() error {
		var errs []error
		for _, p := range ps {
			p.mu.Lock()
			err := p.err // before we end it ourselves
			p.mu.Unlock()
			_ = p.conn.Close()
			<-p.done
			if err != nil {
				errs = append(errs, fmt.Errorf("client %s: %w", p.key, err))
			}
		}
		return errors.Join(errs...)
	}
	for i := range n {
		c, err := w.client.Dial(ctx, "tcp", net.JoinHostPort(vip, port))
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		p := &probe{conn: c, key: fmt.Sprintf("probe-%d-%d", time.Now().UnixNano(), i), done: make(chan struct{}), last: time.Now()}
		ps = append(ps, p)
		go p.run()
	}
	since := time.Now()
	if err := waitReplies(ctx, ps, func(p *probe) bool { return p.last.After(since) }); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	return ps, stop, nil
}

func (p *probe) run() {
	defer close(p.done)
	r := bufio.NewReader(p.conn)
	req := fmt.Appendf(nil, "*2\r\n$4\r\nINCR\r\n$%d\r\n%s\r\n", len(p.key), p.key)
	for n := 1; ; n++ {
		_, err := p.conn.Write(req)
		var got string
		if err == nil {
			got, err = r.ReadString('\n')
		}
		if want := fmt.Sprintf(":%d\r\n", n); err == nil && got != want {
			err = fmt.Errorf("wrong reply: want %q, got %q", want, got)
		}
		now := time.Now()
		p.mu.Lock()
		if err != nil {
			p.err = err
			p.mu.Unlock()
			return
		}
		if d := now.Sub(p.last); d > p.worst {
			p.worst, p.end = d, now
		}
		p.last = now
		p.mu.Unlock()
		time.Sleep(probePause)
	}
}

// reset forgets the longest wait so far; one that is under way counts on.
func (p *probe) reset() {
	p.mu.Lock()
	p.worst, p.end = 0, time.Time{}
	p.mu.Unlock()
}

// waitReplies waits until ok holds for every probe; ok is called with its lock.
func waitReplies(ctx context.Context, ps []*probe, ok func(*probe) bool) error {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for {
		all := true
		for _, p := range ps {
			p.mu.Lock()
			err, good := p.err, ok(p)
			p.mu.Unlock()
			if err != nil {
				return fmt.Errorf("client %s: %w", p.key, err)
			}
			all = all && good
		}
		if all {
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for replies: %w", ctx.Err())
		}
	}
}

// stall is the longest wait of a probe since its reset.
func (p *probe) stall() (d time.Duration, end time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.worst, p.end
}
