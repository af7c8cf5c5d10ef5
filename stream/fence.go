package stream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

// Fence is the licence of an epoch: the record that makes a node the primary.
type Fence struct {
	Epoch Epoch
	Node  string    // who
	At    time.Time // when, by that node's clock; for people only
	Seq   StreamSeq // its own place in the stream; not on the wire
	Prev  StreamSeq // the fence before it, 0 for the first
	Nonce [16]byte  // tells its author whether an ambiguous publish was stored
}

// Headers of an append (JetStream's optimistic concurrency control).
const (
	hdrLastSeq     = "Nats-Expected-Last-Sequence"
	hdrSubjLastSeq = "Nats-Expected-Last-Subject-Sequence"
	hdrSubj        = "Nats-Expected-Last-Subject-Sequence-Subject"
)

// LastFence reads the newest fence; ErrMissing when the service never had a
// primary. It is no proof of ownership: an isolated leader answers, too.
func (l *Log) LastFence(ctx context.Context) (Fence, error) {
	c, err := l.control(ctx)
	if err != nil {
		return Fence{}, fmt.Errorf("read fence: %w", err)
	}
	return l.lastFence(ctx, c)
}

func (l *Log) lastFence(ctx context.Context, c *conn) (Fence, error) {
	m, err := c.getMsg(ctx, l.names.logStream, map[string]any{"last_by_subj": l.names.fence})
	if err != nil {
		return Fence{}, fmt.Errorf("read fence: %w", err)
	}
	return decodeFence(m.Data, m.Seq)
}

func (l *Log) fenceAt(ctx context.Context, c *conn, seq StreamSeq) (Fence, error) {
	m, err := c.getMsg(ctx, l.names.logStream, map[string]any{"seq": seq})
	if err != nil {
		return Fence{}, fmt.Errorf("read fence %d: %w", seq, err)
	}
	if m.Subject != l.names.fence {
		return Fence{}, fmt.Errorf("read fence %d: %w log: a message of %s is there", seq, ErrCorrupt, m.Subject)
	}
	return decodeFence(m.Data, m.Seq)
}

// fenceBefore is the fence in force at seq: the newest before it; zero for none.
func (l *Log) fenceBefore(ctx context.Context, c *conn, seq StreamSeq) (Fence, error) {
	f, err := l.lastFence(ctx, c)
	for err == nil && f.Seq >= seq {
		if f.Prev == 0 {
			return Fence{}, nil
		}
		f, err = l.fenceAt(ctx, c, f.Prev)
	}
	if errors.Is(err, ErrMissing) {
		return Fence{}, nil
	}
	return f, err
}

// Acquire makes node the primary, whoever was it before: it appends the fence
// of the next epoch and tries again until that has happened or ctx ends. Every
// older Writer is fenced from then on.
func (l *Log) Acquire(ctx context.Context, node string) (*Writer, error) {
	return l.acquire(ctx, node, nil)
}

// AcquireIf is Acquire unless the newest fence is another than prev (0: there
// is none): then it answers ErrFenced. Of several standbys that saw the same
// fence exactly one wins.
func (l *Log) AcquireIf(ctx context.Context, node string, prev StreamSeq) (*Writer, error) {
	return l.acquire(ctx, node, &prev)
}

func (l *Log) acquire(ctx context.Context, node string, prev *StreamSeq) (*Writer, error) {
	if err := checkName("node", node, maxNodeName); err != nil {
		return nil, fmt.Errorf("acquire log: %w", err)
	}
	a := attempt{l: l, claim: claim{node: node, prev: prev}}
	if _, err := rand.Read(a.claim.nonce[:]); err != nil {
		return nil, fmt.Errorf("acquire log: %w", err)
	}
	defer func() { a.conn.close() }()
	var last error
	for try := 0; ; try++ {
		w, err := a.once(ctx)
		if err == nil {
			return w, nil
		}
		if !errors.Is(err, errRace) {
			a.conn.close()
			a.conn = nil
		}
		for _, final := range []error{ErrFenced, ErrRefused, ErrCorrupt, ErrVersion, ErrClosed} {
			if errors.Is(err, final) {
				return nil, fmt.Errorf("acquire log: %w", err)
			}
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		// Against a live writer of a cluster most single tries lose, so the first
		// pauses are short; they are random so that two standbys do not dance.
		pause := time.Duration(1+mrand.IntN(1<<min(try+2, 7))) * time.Millisecond
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("acquire log: %w: %w", ctx.Err(), last)
		}
	}
}

// errRace is a fence that was refused because something else came first.
var errRace = errors.New("append fence: race lost")

// attempt carries a claim out, over as many connections as it takes.
type attempt struct {
	l     *Log
	claim claim
	conn  *conn
}

func (a *attempt) once(ctx context.Context) (*Writer, error) {
	l := a.l
	if l.ctx.Err() != nil {
		return nil, ErrClosed
	}
	if a.conn == nil {
		c, err := l.takeSpare(ctx)
		if err != nil {
			return nil, err
		}
		a.conn = c
	}
	cur, err := l.lastFence(ctx, a.conn)
	if err != nil && !errors.Is(err, ErrMissing) {
		return nil, err
	}
	step, f, err := a.claim.newest(cur, time.Now())
	if err != nil {
		return nil, err
	}
	if step == claimPublish {
		if err := a.publish(ctx, f); err != nil {
			return nil, err
		}
	}
	stable, newest, err := a.tail(ctx)
	if err != nil {
		return nil, err
	}
	c := a.conn
	a.conn = nil
	return newWriter(l, c, a.claim.mine, stable, newest), nil
}

func (a *attempt) publish(ctx context.Context, f Fence) error {
	l := a.l
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	m, err := a.conn.nc.RequestMsgWithContext(ctx, &nats.Msg{
		Subject: l.names.fence,
		Data:    encodeFence(f),
		Header:  nats.Header{hdrSubjLastSeq: {strconv.FormatUint(uint64(f.Prev), 10)}},
	})
	if err != nil {
		return fmt.Errorf("append fence: %w", classify(err))
	}
	seq, err := parseAck(m)
	if errors.Is(err, ErrFull) {
		// A full log must not keep a service from being taken over.
		err = errors.Join(err, l.Grow(ctx, 1<<20))
	}
	if errors.Is(err, ErrRefused) {
		// Lost to another fence, or on a cluster to an append that was being
		// replicated: the next reading tells which.
		return fmt.Errorf("%w: %v", errRace, err) //nolint:errorlint // not a refusal to the caller, who tries again
	}
	if err != nil {
		return fmt.Errorf("append fence: %w", err)
	}
	f.Seq = seq
	a.claim.mine = f
	return nil
}

// tail finds the last position before our fence, and the batch that holds it. A
// message that is not there where one must be means that the server lags behind
// its cluster; a wrong first position would be worse than a second try.
func (a *attempt) tail(ctx context.Context) (Position, StreamSeq, error) {
	l := a.l
	t := tailOf(a.claim.mine)
	for t.seq > 0 {
		if t.fence() {
			prev, err := l.fenceAt(ctx, a.conn, t.seq)
			if err != nil {
				return 0, 0, lagging(err)
			}
			t.tookFence(prev)
			continue
		}
		m, err := a.conn.getMsg(ctx, l.names.logStream, map[string]any{"seq": t.seq})
		if err != nil {
			return 0, 0, lagging(fmt.Errorf("read newest batch %d: %w", t.seq, err))
		}
		if m.Subject != l.names.data {
			return 0, 0, fmt.Errorf("read newest batch %d: %w log: a message of %s is there", t.seq, ErrCorrupt, m.Subject)
		}
		h, err := decodeHeader(m.Data)
		if err != nil {
			return 0, 0, fmt.Errorf("read newest batch %d: %w", t.seq, err)
		}
		last, found, err := t.tookBatch(h)
		if err != nil {
			return 0, 0, fmt.Errorf("read newest batch %d: %w", t.seq, err)
		}
		if found {
			return last, t.seq, nil
		}
	}
	return 0, 0, nil
}

func lagging(err error) error {
	if errors.Is(err, ErrMissing) {
		return fmt.Errorf("server lags behind, or the log was purged by hand: %w", err)
	}
	return err
}
