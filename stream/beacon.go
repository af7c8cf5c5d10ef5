package stream

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// Beat is one heartbeat as it arrived.
type Beat struct {
	Role, Node string
	Run        uint64    // random for each StartBeacon
	N          uint64    // counts from 1 in each run
	At         time.Time // when it arrived
	Payload    []byte    // the receiver's to keep
}

// MaxBeatPayload is the most a heartbeat carries, in octets.
const MaxBeatPayload = 4096

// beatPing is how often a connection for heartbeats is tried; it is given up
// when two answers are missing.
const beatPing = 300 * time.Millisecond

const beatHeader = 4 + 8 + 8

func appendBeat(dst []byte, run, n uint64, payload []byte) []byte {
	dst = be.AppendUint32(dst, magicBeat)
	dst = be.AppendUint64(be.AppendUint64(dst, run), n)
	return append(dst, payload...)
}

// decodeBeat reads a heartbeat without trust.
func decodeBeat(prefix, subject string, b []byte, at time.Time) (Beat, error) {
	if err := checkMagic("heartbeat", b, magicBeat, beatHeader); err != nil {
		return Beat{}, err
	}
	role, node, _ := strings.Cut(strings.TrimPrefix(subject, prefix), ".")
	if checkName("role", role, maxNodeName) != nil || checkName("node", node, maxNodeName) != nil || len(b) > beatHeader+MaxBeatPayload {
		return Beat{}, fmt.Errorf("%w heartbeat: %d octets of %q", ErrCorrupt, len(b), subject)
	}
	return Beat{Role: role, Node: node, Run: be.Uint64(b[4:]), N: be.Uint64(b[12:]), At: at, Payload: b[beatHeader:]}, nil
}

// StartBeacon sends heartbeats until ctx or the Log ends. They are not stored.
// payload may be nil; it is called from the beacon's goroutine before each,
// and more than MaxBeatPayload of it is left out. A lost server is waited for.
func (l *Log) StartBeacon(ctx context.Context, role, node string, every time.Duration, payload func() []byte) error {
	if err := checkName("role", role, maxNodeName); err != nil {
		return fmt.Errorf("start heartbeat: %w", err)
	}
	if err := checkName("node", node, maxNodeName); err != nil {
		return fmt.Errorf("start heartbeat: %w", err)
	}
	if every <= 0 {
		return fmt.Errorf("start heartbeat: %w interval %v", ErrInvalid, every)
	}
	subject, run := l.names.beat+role+"."+node, rand.Uint64()
	return l.attend(ctx, "beacon", func(context.Context, *conn) error { return nil }, func(ctx context.Context, next func() *conn) {
		t := time.NewTicker(every)
		defer t.Stop()
		var buf []byte
		for n := uint64(1); ; n++ {
			var p []byte
			if payload != nil {
				p = payload()
				p = p[:min(len(p), MaxBeatPayload)]
			}
			c := next()
			if c == nil {
				return
			}
			buf = appendBeat(buf[:0], run, n, p)
			_ = c.nc.Publish(subject, buf) // an error means a lost connection; next sees to it
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	})
}

// WatchBeats calls fn for each heartbeat of the service, of any role and node
// (one's own as well), from one goroutine, until ctx or the Log ends. It
// returns as soon as it listens. A lost server is waited for, which to the
// listener is silence.
func (l *Log) WatchBeats(ctx context.Context, fn func(Beat)) error {
	ch := make(chan *nats.Msg, 1024)
	listen := func(ctx context.Context, c *conn) error {
		if _, err := c.nc.ChanSubscribe(l.names.beat+"*.*", ch); err != nil {
			return err
		}
		return c.nc.FlushWithContext(ctx) // from here on nothing is missed
	}
	return l.attend(ctx, "watch", listen, func(ctx context.Context, next func() *conn) {
		for {
			c := next()
			if c == nil {
				return
			}
			for alive := true; alive; {
				select {
				case m := <-ch:
					if b, err := decodeBeat(l.names.beat, m.Subject, m.Data, time.Now()); err == nil {
						fn(b)
					}
				case <-c.lost:
					alive = false
				case <-ctx.Done():
					return
				}
			}
		}
	})
}

// attend runs work in a goroutine of the Log's, with a connection of its own:
// next gives the present one, made anew and prepared by setup when the last was
// lost, or nil at the end. The first is made before attend returns.
func (l *Log) attend(ctx context.Context, name string, setup func(context.Context, *conn) error, work func(context.Context, func() *conn)) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(l.ctx, cancel)
	open := func() (*conn, error) {
		// A connection that an outage left behind, its TCP waiting ever longer to
		// try again, must not look like a dead node for seconds.
		c, err := l.dial.connect(ctx, l.names.service+" "+name, append(slices.Clip(l.dial.quick),
			nats.PingInterval(beatPing), nats.MaxPingsOutstanding(2)))
		if err != nil {
			return nil, err
		}
		sctx, done := context.WithTimeout(ctx, apiTimeout)
		defer done()
		if err := setup(sctx, c); err != nil {
			c.close()
			return nil, classify(err)
		}
		return c, nil
	}
	c, err := open()
	if err != nil {
		stop()
		cancel()
		return fmt.Errorf("start %s: %w", name, err)
	}
	next := func() *conn {
		for c == nil || c.nc.IsClosed() {
			if ctx.Err() != nil {
				return nil
			}
			if c, err = open(); err != nil {
				c = nil
				select {
				case <-time.After(redialGap):
				case <-ctx.Done():
				}
			}
		}
		return c
	}
	l.mu.Lock()
	if l.ctx.Err() != nil {
		l.mu.Unlock()
		stop()
		cancel()
		c.close()
		return fmt.Errorf("start %s: %w", name, ErrClosed)
	}
	l.wg.Add(1)
	l.mu.Unlock()
	go func() {
		defer l.wg.Done()
		defer cancel()
		defer stop()
		work(ctx, next)
		c.close()
	}()
	return nil
}
