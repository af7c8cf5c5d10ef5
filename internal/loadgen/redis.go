package loadgen

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// redialPause keeps a connection whose server is away from spinning.
const redialPause = 100 * time.Millisecond

// lane is one connection's work: it runs until stop is closed, and at once ends
// what it is waiting for when ctx ends.
type lane interface {
	run(ctx context.Context, stop <-chan struct{})
}

// redisLane is one connection of the go-redis library.
type redisLane struct {
	addr string
	pace time.Duration // mean wait between requests
	rng  *rand.Rand
	name string
	m    *meter

	dials int
	lost  bool // the next dial follows a reset that was counted
}

func (l *redisLane) client() *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr:             l.addr,
		Dialer:           l.dial,
		PoolSize:         1,
		PipelinePoolSize: -1, // or pipelines have connections of their own
		MaxRetries:       -1, // a retry would hide a reset
		DialerRetries:    1,
		ConnMaxIdleTime:  -1,
		ReadTimeout:      -1, // how late a reply comes is what is measured
		WriteTimeout:     -1,
		DisableIdentity:  true,
		// Deadlines of ctx, which ends when the run gives up.
		ContextTimeoutEnabled:    true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
}

// dial is called by the library, from the lane's own calls.
func (l *redisLane) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	l.dials++
	if l.dials > 1 && !l.lost {
		l.m.reset(errors.New("the library found its idle connection closed"))
		l.lost = true
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	l.lost = false
	return meteredConn{c, l.m}, nil
}

// meteredConn counts what is received. All of it is parsed by the library and
// compared by the lane, but for the two octets that end a bulk string: the
// library takes them for CR LF unseen. The raw lanes look at those too.
type meteredConn struct {
	net.Conn
	m *meter
}

func (c meteredConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.m.checked(n)
	return n, err
}

func (l *redisLane) run(ctx context.Context, stop <-chan struct{}) {
	c := l.client()
	defer c.Close()
	// The library looks at the context only between system calls.
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	mod := newModel(l.rng, l.name)
	for life := 1; ; {
		if err := l.request(ctx, c, mod.pipeline()); err != nil {
			if aborted(ctx) {
				return
			}
			l.m.reset(err)
			l.lost = true
			life++
			mod = newModel(l.rng, fmt.Sprintf("%s.%d", l.name, life))
			if !pause(ctx, stop, redialPause) {
				return
			}
			continue
		}
		if !pause(ctx, stop, time.Duration(l.rng.ExpFloat64()*float64(l.pace))) {
			return
		}
	}
}

// request sends commands together and compares their replies. The error is that
// of the connection; a wrong reply is counted and is none.
func (l *redisLane) request(ctx context.Context, c *redis.Client, ops []op) error {
	cmds := make([]*redis.Cmd, len(ops))
	start := time.Now()
	if len(ops) == 1 {
		cmds[0] = c.Do(ctx, ops[0].args...)
	} else {
		p := c.Pipeline()
		for i, o := range ops {
			cmds[i] = p.Do(ctx, o.args...)
		}
		_, _ = p.Exec(ctx) // each command has its own error
	}
	for i, cmd := range cmds {
		got, err := cmd.Result()
		var answer redis.Error
		switch {
		case err == nil, errors.Is(err, redis.Nil):
		case errors.As(err, &answer):
			got = "error reply: " + answer.Error()
		default:
			return fmt.Errorf("%v: %w", ops[i].args[0], err)
		}
		if !same(ops[i].want, got) {
			l.m.mismatch("%v %v: want %s, got %s", ops[i].args[0], ops[i].args[1], short(ops[i].want), short(got))
		}
	}
	l.m.done(start, len(ops))
	return nil
}

// pause waits; false means that the run is over.
func pause(ctx context.Context, stop <-chan struct{}, d time.Duration) bool {
	select { // a wait of nothing must notice the end as well
	case <-stop:
		return false
	default:
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	case <-ctx.Done():
		return false
	}
}
