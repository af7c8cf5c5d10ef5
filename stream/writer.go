package stream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ackTimeout: a leader that steps down can drop what is in flight without a
// word, so silence has to be looked into; sooner than this it is most often
// only a slow disk.
const ackTimeout = 500 * time.Millisecond

// Writer appends to the log for one epoch. Its methods are safe for concurrent
// use, and none but Drain, Purge and Close waits for the network.
//
// What it promises: a position is stable only when JetStream has acknowledged
// it and all before it; positions become stable in order; when the server
// cannot be reached or is full, nothing is lost or doubled, the Writer keeps
// trying for as long as it lives; only another node's fence (or Close) ends it.
//
// One goroutine does all its work: it asks the machine what to do, does it,
// and reports how it went.
type Writer struct {
	log    *Log
	fence  Fence
	wake   chan struct{}
	done   chan struct{}
	cancel context.CancelFunc

	mu       sync.Mutex // guards what follows
	moved    *sync.Cond // Stable has advanced, or the Writer has ended
	m        *machine
	onStable func(Position)
	onEnd    func(error)

	purge  sync.Mutex // one Purge at a time
	purged StreamSeq  // data before it is gone; 0: not known yet; guarded by purge

	// The goroutine's own.
	conn   *conn
	header nats.Header
	timer  *time.Timer
}

func newWriter(l *Log, c *conn, f Fence, stable Position, newest StreamSeq) *Writer {
	ctx, cancel := context.WithCancel(context.Background())
	w := &Writer{
		log: l, fence: f, cancel: cancel,
		wake: make(chan struct{}, 1), done: make(chan struct{}),
		m:    newMachine(f, stable, newest, ackTimeout, l.cfg.MaxBacklog, time.Now()),
		conn: c,
		header: nats.Header{
			hdrLastSeq:     {""},
			hdrSubjLastSeq: {""},
			hdrSubj:        {l.names.fence},
		},
		timer: time.NewTimer(time.Hour),
	}
	w.moved = sync.NewCond(&w.mu)
	go w.run(ctx)
	return w
}

// Epoch is the tenure this Writer writes.
func (w *Writer) Epoch() Epoch { return w.fence.Epoch }

// Fence is the record that licences this Writer. A recovery reads the log up
// to Fence().Seq.
func (w *Writer) Fence() Fence { return w.fence }

// Next is the position of the next record.
func (w *Writer) Next() Position {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m.next
}

// Append puts r behind what was appended before; p must be Next. It encodes r
// before it returns, so the caller may use r's memory again, and never waits.
// A *Bytes or *ConnState is taken, too, and spares the caller an allocation.
// Errors, none of which uses up the position: ErrOrder, ErrBacklog,
// ErrInvalid, ErrFenced, ErrClosed.
func (w *Writer) Append(p Position, r Record) error {
	w.mu.Lock()
	err := w.m.append(p, r)
	wake := w.m.idle()
	w.mu.Unlock()
	if wake {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	return err
}

// Stable is the position up to which, and with which, all is stable. Right
// after Acquire it is the last position of the epoch before.
func (w *Writer) Stable() Position {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m.stable
}

// Backlog is what was appended and is not stable yet.
func (w *Writer) Backlog() (records, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int(w.m.next - w.m.stable - 1), w.m.backlog
}

// OnStable sets the function that hears of every advance of Stable, in order,
// from the Writer's goroutine; it must not block. Set it before the first
// Append.
func (w *Writer) OnStable(f func(Position)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onStable = f
}

// OnEnd sets the function that hears once that the Writer has ended, with
// ErrFenced or ErrClosed. If it already has, f is called at once.
func (w *Writer) OnEnd(f func(error)) {
	w.mu.Lock()
	ended := w.m.endTold
	w.onEnd = f
	err := w.m.end
	w.mu.Unlock()
	if ended {
		f(err)
	}
}

// WriterPhase is how a Writer is getting on.
type WriterPhase uint8

// How a Writer is getting on.
const (
	WriterOK      WriterPhase = iota // the log answers
	WriterStalled                    // appends are held until the log answers again
	WriterFenced                     // ended: another node is the primary
	WriterClosed                     // ended by Close
)

// WriterState says how a Writer is getting on.
type WriterState struct {
	Phase WriterPhase
	Since time.Time // when Phase began
	Err   error     // why; wraps one of the sentinels; nil when OK
}

// State says how the Writer is getting on.
func (w *Writer) State() WriterState {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m.state()
}

// WriterStats counts what became of ambiguous answers.
type WriterStats struct {
	Reconnects int // connections made after the first
	Settled    int // batches that were found stored after all
	Resent     int // batches that were not, and were sent again
}

// Stats counts since Acquire.
func (w *Writer) Stats() WriterStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return WriterStats{w.m.reconns, w.m.settled, w.m.resent}
}

// SeqOf is the batch that holds a stable position of this epoch, and false for
// any other position and for one that Purge dropped. After very many batches
// without a Purge the answer may be an earlier batch, never a later one.
func (w *Writer) SeqOf(p Position) (StreamSeq, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.m.seqOf(p)
}

// Drain waits until all that was appended before the call is stable.
func (w *Writer) Drain(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.moved.Broadcast()
	})()
	w.mu.Lock()
	defer w.mu.Unlock()
	for goal := w.m.next - 1; w.m.stable < goal; {
		if w.m.end != nil {
			return fmt.Errorf("drain log: %w", w.m.end)
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(fmt.Errorf("drain log: %d records are not stable: %w", goal-w.m.stable, err), w.m.stalled)
		}
		w.moved.Wait()
	}
	return nil
}

// Close ends the Writer; what is not stable by then may or may not become so.
// It returns when its goroutine has ended, so never call it from OnStable or
// OnEnd.
func (w *Writer) Close() error {
	w.mu.Lock()
	w.m.finish(time.Now(), fmt.Errorf("log writer: %w", ErrClosed))
	w.mu.Unlock()
	w.cancel()
	<-w.done
	return nil
}

func (w *Writer) run(ctx context.Context) {
	defer close(w.done)
	defer w.cancel()
	for {
		w.mu.Lock()
		a := w.m.step(time.Now())
		stable, end := w.onStable, w.onEnd
		if a.kind == actStable || a.kind == actEnd {
			w.moved.Broadcast()
		}
		w.mu.Unlock()
		switch a.kind {
		case actWait:
			w.wait(ctx, a.until)
		case actGather:
			nap(time.Until(a.until))
		case actPublish:
			w.publish(a.batch)
		case actStable:
			if stable != nil {
				stable(a.upTo)
			}
		case actConnect:
			w.connect(ctx)
		case actFence:
			w.readFence(ctx)
		case actRead:
			w.readSeq(ctx, a.seq)
		case actEnd:
			w.conn.close()
			if end != nil {
				end(a.err)
			}
			return
		}
	}
}

// event tells the machine something.
func (w *Writer) event(f func(m *machine, now time.Time)) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w.m, now)
}

func (w *Writer) fail(err error) {
	w.event(func(m *machine, now time.Time) { m.lost(now, err) })
}

// wait returns when there may be something to do.
func (w *Writer) wait(ctx context.Context, until time.Time) {
	var acks chan *nats.Msg
	var lost chan struct{}
	if w.conn != nil {
		acks, lost = w.conn.acks, w.conn.lost
	}
	w.timer.Reset(time.Until(until))
	select {
	case m := <-acks:
		w.answer(m)
	case <-w.wake:
	case <-w.timer.C:
	case <-lost:
		w.conn = nil
		w.fail(fmt.Errorf("%w: connection lost", ErrUnreachable))
	case <-ctx.Done():
	}
}

// answer is an acknowledgement, an error, or somebody's fence.
func (w *Writer) answer(msg *nats.Msg) {
	if msg.Subject == w.log.names.fence {
		w.event((*machine).hint)
		return
	}
	num, err := strconv.ParseUint(strings.TrimPrefix(msg.Subject, w.conn.inbox), 10, 64)
	if err != nil {
		return
	}
	seq, err := parseAck(msg)
	w.event(func(m *machine, now time.Time) {
		if err == nil {
			m.acked(now, num, seq)
			return
		}
		if last, ok := lastSequence(err); ok && m.flight != nil && last < m.flight.exp {
			err = fmt.Errorf("%w: its last sequence is %d, it had acknowledged %d", ErrRolledBack, last, m.flight.exp)
		}
		m.rejected(now, num, err)
	})
}

// lastSequence is what a refused append says about the log's end.
func lastSequence(err error) (StreamSeq, bool) {
	var api *jetstream.APIError
	if !errors.As(err, &api) || api.ErrorCode != apiWrongLastSeq {
		return 0, false
	}
	n, perr := strconv.ParseUint(api.Description[strings.LastIndexByte(api.Description, ' ')+1:], 10, 64)
	return StreamSeq(n), perr == nil
}

func (w *Writer) publish(b *batch) {
	if w.conn == nil {
		w.fail(fmt.Errorf("%w: no connection", ErrUnreachable))
		return
	}
	only := b.conditions(w.fence)
	w.header[hdrLastSeq][0] = strconv.FormatUint(uint64(only.lastSeq), 10)
	w.header[hdrSubjLastSeq][0] = strconv.FormatUint(uint64(only.lastFence), 10)
	err := w.conn.nc.PublishMsg(&nats.Msg{
		Subject: w.log.names.data,
		Reply:   w.conn.inbox + strconv.FormatUint(b.num, 10),
		Header:  w.header,
		Data:    b.buf,
	})
	if err != nil {
		w.fail(classify(err))
	}
}

func (w *Writer) connect(ctx context.Context) {
	w.conn.close() // nothing more of the old one can be written from here on
	w.conn = nil
	c, err := w.log.dialWriter(ctx)
	if err != nil {
		w.fail(err)
		return
	}
	w.conn = c
	w.event((*machine).connected)
}

func (w *Writer) readFence(ctx context.Context) {
	f, err := Fence{}, ErrUnreachable
	if w.conn != nil {
		f, err = w.log.lastFence(ctx, w.conn)
	}
	if err != nil && !errors.Is(err, ErrMissing) {
		w.fail(err)
		return
	}
	w.event(func(m *machine, now time.Time) { m.fenceRead(now, f) })
}

func (w *Writer) readSeq(ctx context.Context, seq StreamSeq) {
	if w.conn == nil {
		w.fail(fmt.Errorf("%w: no connection", ErrUnreachable))
		return
	}
	msg, err := w.conn.getMsg(ctx, w.log.names.logStream, map[string]any{"seq": seq})
	if err != nil && !errors.Is(err, ErrMissing) {
		w.fail(err)
		return
	}
	what, h := foundNothing, header{}
	if err == nil {
		what, h = look(msg.Subject == w.log.names.data, msg.Data)
	}
	w.event(func(m *machine, now time.Time) { m.seqRead(now, what, h.epoch, h.number) })
}
