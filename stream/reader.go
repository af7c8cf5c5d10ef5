package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Entry is one step of the log: a record, or (Rec nil) a fence.
type Entry struct {
	Epoch Epoch
	Pos   Position  // of Rec; for a fence the last position before it, 0 if the Reader has seen none
	Seq   StreamSeq // the message it came in
	Rec   Record    // its slices are the reader's to keep; nil for a fence
	Fence *Fence    // nil for a record
}

const (
	pullBytes     = 16 << 20 // more than 32 MiB made replay far slower
	pullHeartbeat = 500 * time.Millisecond
	refusedFor    = 15 * time.Second // a refusal that lasts longer is one
	readerIdle    = 30 * time.Second // after which the server forgets a consumer that is gone
)

// Reader follows the log. It is for one goroutine; Close may come from any.
type Reader struct {
	log *Log
	f   follower
	// want is the sequence of the next message; strict says that it must be that
	// very message, and not one after it: what is before was asked for.
	want   StreamSeq
	strict bool
	ready  []Entry // decoded, not yet handed out; aliases one message
	head   int
	err    error // final

	pulling sync.Mutex // held while Next waits, so that Close knows who cleans up
	conn    *conn
	how     []nats.Option // of the connection
	iter    jetstream.MessagesContext
	fail    int       // tries to open in a row that failed
	down    time.Time // when the first of them did

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	// merged ends with the context of the last Next, with Close, and with the
	// connection; kept because Next mostly comes with the same context.
	from   context.Context
	merged context.Context
	drop   context.CancelFunc
}

// NewReader reads from the message from on; 0 and 1 mean the oldest there is.
// It asks the server once for the fence in force at from; errors as of Open.
func (l *Log) NewReader(ctx context.Context, from StreamSeq) (*Reader, error) {
	r := &Reader{log: l, want: max(from, 1), strict: from > 1}
	if from > 1 {
		c, err := l.control(ctx)
		if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
		f, err := l.fenceBefore(ctx, c, from)
		if err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
		r.f.epoch = f.Epoch
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Next waits for the next entry. Records of an epoch older than the latest
// fence are dropped: they were never stable. A lost server is waited for and
// reading goes on where it stopped. Errors: ctx's, ErrClosed, ErrPurged,
// ErrHole, ErrCorrupt, ErrVersion, ErrRefused; all but ctx's are final.
func (r *Reader) Next(ctx context.Context) (Entry, error) {
	e, _, err := r.nextUpTo(ctx, 1<<64-1)
	return e, err
}

// nextUpTo is Next, unless the message to has been taken in and has nothing
// more: then it answers false.
func (r *Reader) nextUpTo(ctx context.Context, to StreamSeq) (Entry, bool, error) {
	for {
		if r.head < len(r.ready) {
			e := r.ready[r.head]
			r.ready[r.head] = Entry{} // the caller's alone from here on
			r.head++
			return e, true, nil
		}
		if r.want > to {
			return Entry{}, false, nil
		}
		if err := r.more(ctx); err != nil {
			return Entry{}, false, err
		}
	}
}

// more takes in a message, or mends what keeps it from doing so.
func (r *Reader) more(ctx context.Context) error {
	r.pulling.Lock()
	defer r.pulling.Unlock()
	if r.err == nil && r.ctx.Err() != nil {
		r.err = fmt.Errorf("read log: %w", ErrClosed)
	}
	if r.err == nil {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.pull(ctx); err != nil {
			r.err = fmt.Errorf("read log: %w", err)
		}
	}
	if r.err != nil {
		r.disconnect()
	}
	return r.err
}

// Close ends a waiting Next and the connection.
func (r *Reader) Close() error {
	r.cancel() // a waiting Next sees this and lets go
	r.pulling.Lock()
	defer r.pulling.Unlock()
	r.disconnect()
	return nil
}

// pull gets one message and takes it in; an error is final.
func (r *Reader) pull(ctx context.Context) error {
	if r.iter == nil {
		if err := r.connect(ctx); err != nil {
			if r.fail == 0 {
				r.down = time.Now()
			}
			// A server that has just started, or a cluster that elects, may refuse
			// what it grants a moment later; a wrong secret stays wrong.
			if errors.Is(err, ErrRefused) && (time.Since(r.down) > refusedFor || errors.Is(err, nats.ErrAuthorization)) {
				return err
			}
			r.fail++
			select { // again, in a moment
			case <-time.After(min(10*time.Millisecond<<min(r.fail, 6), 250*time.Millisecond)):
			case <-ctx.Done():
			case <-r.ctx.Done():
			}
			return nil
		}
		r.fail = 0
	}
	msg, err := r.iter.Next(jetstream.NextContext(r.merge(ctx)))
	if err != nil {
		if ctx.Err() == nil || r.conn.nc.IsClosed() {
			r.disconnect()
		}
		return nil
	}
	meta, err := msg.Metadata()
	if err != nil {
		return fmt.Errorf("%w message: %w", ErrCorrupt, err)
	}
	return r.take(msg.Subject(), msg.Data(), StreamSeq(meta.Sequence.Stream))
}

// take decodes one message into ready.
func (r *Reader) take(subject string, data []byte, seq StreamSeq) error {
	if seq < r.want {
		return nil // again, after a reconnection
	}
	if r.strict && seq != r.want {
		return fmt.Errorf("%w: wanted message %d, the first there is %d", ErrPurged, r.want, seq)
	}
	r.strict, r.want = false, seq+1
	r.ready, r.head = r.ready[:0], 0
	switch subject {
	case r.log.names.fence:
		x, err := decodeFence(data, seq)
		if err != nil {
			return fmt.Errorf("message %d: %w", seq, err)
		}
		if err := r.f.fence(x); err != nil {
			return err
		}
		r.ready = append(r.ready, Entry{Epoch: x.Epoch, Pos: r.f.pos, Seq: seq, Fence: &x})
	case r.log.names.data:
		b, err := DecodeBatch(data)
		if err != nil {
			return fmt.Errorf("message %d: %w", seq, err)
		}
		stale, err := r.f.batch(&b, seq)
		if err != nil || stale {
			return err
		}
		for i, rec := range b.Records {
			r.ready = append(r.ready, Entry{Epoch: b.Epoch, Pos: b.First + Position(i), Seq: seq, Rec: rec})
		}
	default:
		return fmt.Errorf("message %d: %w log: subject %s", seq, ErrCorrupt, subject)
	}
	return nil
}

func (r *Reader) connect(ctx context.Context) error {
	r.disconnect()
	ctx, cancel := context.WithTimeout(ctx, 2*apiTimeout)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)() // Close does not wait for a dead server
	c, err := r.log.dial.connect(ctx, r.log.names.service+" reader", r.how)
	if err != nil {
		return err
	}
	js, err := jetstream.New(c.nc)
	if err != nil {
		c.close()
		return err
	}
	oc, err := js.OrderedConsumer(ctx, r.log.names.logStream, jetstream.OrderedConsumerConfig{
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       uint64(r.want),
		InactiveThreshold: readerIdle,
	})
	if err == nil {
		r.iter, err = oc.Messages(jetstream.PullMaxBytes(pullBytes), jetstream.PullHeartbeat(pullHeartbeat))
	}
	if err != nil {
		r.iter = nil
		c.close()
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return fmt.Errorf("%w: %w", ErrUnreachable, err) // as after a restart, for a moment
		}
		return classify(err)
	}
	r.conn = c
	return nil
}

func (r *Reader) disconnect() {
	if r.drop != nil {
		r.drop()
		r.drop, r.merged, r.from = nil, nil, nil
	}
	if r.iter != nil {
		r.iter.Stop()
		r.iter = nil
	}
	r.conn.close()
	r.conn = nil
}

// merge is ctx, ended also by Close and by the loss of the connection.
func (r *Reader) merge(ctx context.Context) context.Context {
	if r.from == ctx && r.merged.Err() == nil {
		return r.merged
	}
	if r.drop != nil {
		r.drop()
	}
	m, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(r.ctx, cancel)
	lost := r.conn.lost
	go func() {
		select {
		case <-lost:
			cancel()
		case <-m.Done():
		}
	}()
	r.from, r.merged = ctx, m
	r.drop = func() { stop(); cancel() }
	return m
}

// ReadTo gives fn every entry from the message from to the message to, that
// one included, as fast as it can, and returns. It ends early with fn's error.
// Errors are NewReader's and Next's otherwise. from and to are as for
// NewReader; to must exist, as a Writer's fence does.
func (l *Log) ReadTo(ctx context.Context, from, to StreamSeq, fn func(Entry) error) error {
	r, err := l.NewReader(ctx, from)
	if err != nil {
		return err
	}
	defer r.disconnect()
	r.how = l.dial.quick // it does not last
	for {
		e, more, err := r.nextUpTo(ctx, to)
		if err != nil || !more {
			return err
		}
		if err := fn(e); err != nil {
			return err
		}
	}
}
