package stream

import (
	"errors"
	"fmt"
	"time"
)

// machine is the Writer without its network: which batch is published when,
// what an answer, a silence or a lost connection means, and what is stable.
// It has no clock and no goroutine and is not safe for concurrent use.
//
// The rules are those that held in the measurements (docs/WIRE.md, "Appending"):
// one batch in flight; whatever is not the plain acknowledgement of that batch
// with the expected sequence is ambiguous; then the connection is closed, and
// on a new one the fence is read, and the place where the batch must be if it
// was stored. Only that settles it: stored, or sent again with the same
// headers, or fenced.
//
// The caller asks step what to do, does it, and says through the event
// methods how it went.
type machine struct {
	fence      Fence
	ackTimeout time.Duration
	maxBacklog int

	next    Position // of the next append
	stable  Position
	told    Position  // up to where actStable has been given
	last    StreamSeq // of our newest message that is known to be stored
	newest  StreamSeq // of the newest data batch known, of whatever epoch
	nextNum uint64

	queue   []*batch // the last one is open to appends
	flight  *batch   // published, or to be settled and perhaps sent again
	backlog int      // octets of records in queue and flight
	free    [][]byte // buffers of stored batches

	gather gathering
	sent   time.Time // when flight was published

	phase  phase
	at     time.Time // phaseConnect: when to; phaseFlight: deadline; phaseReady: next look at the fence
	tries  int
	failed time.Time // of the last ambiguity

	stalled error
	since   time.Time // when stalled began or ended
	end     error     // set once ended
	endTold bool
	index   seqIndex
	settled int // batches found stored after all
	resent  int
	reconns int
}

type phase uint8

const (
	phaseConnect phase = iota // wants a connection, not before at
	phaseFence                // connected; the fence is to be read
	phaseSettle               // the fence is ours; is the batch in flight stored?
	phaseReady                // may publish
	phaseFlight               // awaits an acknowledgement until at
	phaseEnded
)

// idleCheck is how often an idle Writer looks whether it is still the primary
// and the log still there.
const idleCheck = 500 * time.Millisecond

// mostBackoff bounds the pause between two tries, and calm is how long there
// must be no trouble for the next trouble's pause to begin at nothing.
const (
	mostBackoff = 200 * time.Millisecond
	calm        = 2 * time.Second
)

// publishFirst: a batch up to this size costs less to send than a stable
// notice may, so it goes first and the server works meanwhile.
const publishFirst = 16 << 10

// batch is one message to be.
type batch struct {
	num   uint64
	first Position
	count uint32
	exp   StreamSeq // the stream's last sequence before it
	data  int       // clients' records in it
	buf   []byte    // batchHeader octets, then records
}

func (b *batch) last() Position { return b.first + Position(b.count) - 1 }

type actionKind uint8

const (
	actWait    actionKind = iota // nothing to do until until or an event
	actGather                    // the same, but sleep precisely and through events
	actConnect                   // close what connection there is and make one
	actFence                     // read the newest fence
	actRead                      // read the message seq
	actPublish                   // publish batch, behind batch.exp
	actStable                    // tell upTo
	actEnd                       // close, tell err
)

// action is what step wants done.
type action struct {
	kind  actionKind
	until time.Time
	seq   StreamSeq
	batch *batch
	upTo  Position
	err   error
}

// found is what the settling read saw at a sequence.
type found uint8

const (
	foundNothing found = iota
	foundBatch         // a sound batch, of the given epoch and number
	foundOther         // anything else
)

// look says what a message is.
func look(ofData bool, data []byte) (found, header) {
	if ofData {
		if h, err := decodeHeader(data); err == nil {
			return foundBatch, h
		}
	}
	return foundOther, header{}
}

// newMachine begins behind the fence, on a connection that is good.
// stable is the last position of the epochs before, newest its batch.
func newMachine(f Fence, stable Position, newest StreamSeq, ackTimeout time.Duration, maxBacklog int, now time.Time) *machine {
	return &machine{fence: f, ackTimeout: ackTimeout, maxBacklog: maxBacklog,
		next: stable + 1, stable: stable, told: stable, last: f.Seq, newest: newest,
		phase: phaseReady, at: now.Add(idleCheck), since: now}
}

// append encodes r into the open batch.
func (m *machine) append(p Position, r Record) error {
	if m.end != nil {
		return m.end
	}
	if p != m.next {
		return fmt.Errorf("append: %w: got %d, next is %d", ErrOrder, p, m.next)
	}
	if m.backlog >= m.maxBacklog {
		return fmt.Errorf("append: %w: %d octets wait for the log", ErrBacklog, m.backlog)
	}
	var b *batch
	if len(m.queue) > 0 {
		b = m.queue[len(m.queue)-1]
	} else {
		b = m.openBatch()
	}
	start := len(b.buf)
	buf, err := AppendRecord(b.buf, r)
	if err != nil {
		if b.count == 0 {
			m.dropOpen()
		}
		return fmt.Errorf("append: %w", err)
	}
	size := len(buf) - start
	if len(buf) > MaxBatch && b.count > 0 {
		full := b
		b = m.openBatch()
		b.buf = append(b.buf, buf[start:]...)
		full.buf = buf[:start]
	} else {
		b.buf = buf
	}
	b.count++
	switch r.(type) {
	case Bytes, *Bytes:
		b.data++
	}
	m.next++
	m.backlog += size
	return nil
}

func (m *machine) openBatch() *batch {
	b := &batch{num: m.nextNum, first: m.next}
	m.nextNum++
	if n := len(m.free); n > 0 {
		b.buf = m.free[n-1][:batchHeader]
		m.free = m.free[:n-1]
	} else {
		b.buf = make([]byte, batchHeader, 4096)
	}
	m.queue = append(m.queue, b)
	return b
}

func (m *machine) dropOpen() {
	m.queue = m.queue[:len(m.queue)-1]
	m.nextNum--
}

// idle reports that an append should wake whoever drives the machine.
func (m *machine) idle() bool { return m.phase == phaseReady && m.flight == nil }

// step says what to do at now.
func (m *machine) step(now time.Time) action {
	if m.phase == phaseFlight && !now.Before(m.at) {
		m.ambiguous(now, fmt.Errorf("%w: no acknowledgement within %v", ErrUnreachable, m.ackTimeout))
	}
	if m.stable > m.told && (!m.smallBatchReady() || m.gathering(now)) {
		m.told = m.stable
		return action{kind: actStable, upTo: m.told}
	}
	switch m.phase {
	case phaseConnect:
		if now.Before(m.at) {
			return action{kind: actWait, until: m.at}
		}
		return action{kind: actConnect}
	case phaseFence:
		return action{kind: actFence}
	case phaseSettle:
		return action{kind: actRead, seq: m.flight.exp + 1}
	case phaseReady:
		if m.gathering(now) {
			return action{kind: actGather, until: m.gather.until}
		}
		if m.flight == nil && len(m.queue) > 0 {
			m.flight = m.queue[0]
			m.queue = m.queue[1:]
			m.flight.exp = m.last
			sealBatch(m.flight.buf, header{m.fence.Epoch, m.flight.num, m.flight.first, m.flight.count})
		}
		if m.flight != nil {
			m.phase, m.at, m.sent = phaseFlight, now.Add(m.ackTimeout), now
			return action{kind: actPublish, batch: m.flight}
		}
		if now.Before(m.at) {
			return action{kind: actWait, until: m.at}
		}
		m.phase = phaseFence
		return action{kind: actFence}
	case phaseEnded:
		if m.endTold {
			return action{kind: actWait, until: now.Add(time.Hour)}
		}
		m.endTold = true
		return action{kind: actEnd, err: m.end}
	}
	return action{kind: actWait, until: m.at}
}

func (m *machine) smallBatchReady() bool {
	return m.phase == phaseReady && m.flight == nil && len(m.queue) > 0 && len(m.queue[0].buf) <= publishFirst
}

// gathering reports whether the open batch waits for more.
func (m *machine) gathering(now time.Time) bool {
	return m.flight == nil && len(m.queue) == 1 && len(m.queue[0].buf) <= publishFirst && m.gather.wait(now, m.queue[0].data)
}

// acked: the server says that batch num is stored as seq.
func (m *machine) acked(now time.Time, num uint64, seq StreamSeq) {
	if m.phase != phaseFlight || num != m.flight.num {
		return // of an earlier attempt; the one in flight has its own answer coming
	}
	if seq != m.flight.exp+1 {
		m.ambiguous(now, fmt.Errorf("%w log: batch acknowledged as %d, expected %d", ErrCorrupt, seq, m.flight.exp+1))
		return
	}
	m.gather.stored(now, now.Sub(m.sent), m.flight.data)
	m.store(now)
}

// rejected: the server answered batch num with an error.
func (m *machine) rejected(now time.Time, num uint64, err error) {
	if m.phase != phaseFlight || num != m.flight.num {
		return
	}
	m.ambiguous(now, err)
}

// lost: the connection is gone, or an operation on it failed.
func (m *machine) lost(now time.Time, err error) {
	if m.phase == phaseEnded || m.phase == phaseConnect && now.Before(m.at) {
		return
	}
	m.ambiguous(now, err)
}

// ambiguous begins the settling: on a new connection, after a pause that grows.
func (m *machine) ambiguous(now time.Time, err error) {
	if m.phase == phaseEnded {
		return
	}
	if m.stalled == nil {
		m.since = now
	}
	m.stalled = err
	if now.Sub(m.failed) > calm {
		m.tries = 0
	}
	m.failed = now
	m.phase, m.at = phaseConnect, now.Add(backoff(m.tries, err))
	m.tries++
}

func backoff(tries int, err error) time.Duration {
	if tries == 0 && !errors.Is(err, ErrFull) {
		return 0
	}
	return min(10*time.Millisecond<<min(tries, 8), mostBackoff)
}

// connected answers actConnect.
func (m *machine) connected(now time.Time) {
	if m.phase == phaseConnect {
		m.phase = phaseFence
		m.reconns++
	}
}

// fenceRead answers actFence with what the newest fence is.
func (m *machine) fenceRead(now time.Time, f Fence) {
	if m.phase != phaseFence {
		return
	}
	switch {
	case f.Seq == m.fence.Seq && f.Nonce == m.fence.Nonce:
		if m.flight != nil {
			m.phase = phaseSettle
			return
		}
		m.ready(now)
	case f.Epoch >= m.fence.Epoch:
		m.finish(now, fmt.Errorf("%w: %s since %s (epoch %d)", ErrFenced, f.Node, f.At.Format(time.RFC3339), f.Epoch))
	default:
		// Not fenced: either this server lags, or the log lost what it had
		// acknowledged. Neither gives us the right to go on.
		m.ambiguous(now, fmt.Errorf("%w log: its newest fence is of epoch %d, ours was %d", ErrRolledBack, f.Epoch, m.fence.Epoch))
	}
}

// seqRead answers actRead.
func (m *machine) seqRead(now time.Time, what found, epoch Epoch, num uint64) {
	if m.phase != phaseSettle {
		return
	}
	switch {
	case what == foundNothing:
		// The same message, with the same conditions: if the first copy is still
		// on its way, only one of the two can be stored.
		m.resent++
		m.phase = phaseReady
	case what == foundBatch && epoch == m.fence.Epoch && num == m.flight.num:
		m.settled++
		m.store(now)
	default:
		m.finish(now, fmt.Errorf("%w: message %d is not ours", ErrFenced, m.flight.exp+1))
	}
}

// hint: somebody may have fenced us. Only a reading tells.
func (m *machine) hint(now time.Time) {
	if m.idle() {
		m.phase = phaseFence
	}
}

// store: the batch in flight is stable.
func (m *machine) store(now time.Time) {
	b := m.flight
	m.flight = nil
	m.last = b.exp + 1
	m.newest = m.last
	m.stable = b.last()
	m.index.add(b.first, m.last)
	m.backlog -= len(b.buf) - batchHeader
	if len(m.free) < 4 {
		m.free = append(m.free, b.buf)
	}
	b.buf = nil
	m.ready(now)
}

func (m *machine) ready(now time.Time) {
	m.phase, m.at = phaseReady, now.Add(idleCheck)
	if m.stalled != nil {
		m.stalled, m.since = nil, now
	}
}

// finish is the end: fenced or closed.
func (m *machine) finish(now time.Time, err error) {
	if m.phase == phaseEnded {
		return
	}
	m.phase, m.end, m.since = phaseEnded, err, now
}

func (m *machine) state() WriterState {
	switch {
	case errors.Is(m.end, ErrFenced):
		return WriterState{WriterFenced, m.since, m.end}
	case m.end != nil:
		return WriterState{WriterClosed, m.since, m.end}
	case m.stalled != nil:
		return WriterState{WriterStalled, m.since, m.stalled}
	}
	return WriterState{WriterOK, m.since, nil}
}

// seqOf is Writer.SeqOf.
func (m *machine) seqOf(p Position) (StreamSeq, bool) {
	if p > m.stable {
		return 0, false
	}
	return m.index.find(p)
}
