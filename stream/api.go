package stream

import (
	"context"
	"errors"
	"io"
	"time"
)

var errNotBuilt = errors.New("stream: not built yet")

// ChunkSize is the size of every chunk but the last of an input.
const ChunkSize = 256 << 10

// MaxBlob is the largest blob, in octets.
const MaxBlob = 64 << 20

// StoreOptions says how to store.
type StoreOptions struct {
	// Compress packs each chunk with zstd where that makes it smaller.
	Compress bool
}

// Store keeps checkpoint images as chunks by content. It is safe for
// concurrent use, but for Collect, which must not run beside a Put.
type Store struct{}

// Store gives access to the service's checkpoint store.
func (l *Log) Store(o StoreOptions) *Store { return nil }

// PutReader stores all of r in chunks and returns their hashes in order, when
// all are stored, and how many octets it had to send. Chunks that the store
// has are not sent again. Errors: r's, ErrFull, ErrUnreachable, ctx's.
func (s *Store) PutReader(ctx context.Context, r io.Reader) (chunks []Hash, sent int64, err error) {
	return nil, 0, errNotBuilt
}

// PutBlob stores b, at most MaxBlob octets, under one hash.
func (s *Store) PutBlob(ctx context.Context, b []byte) (Hash, error) { return Hash{}, errNotBuilt }

// Get reads a chunk or a blob and checks it against its hash: ErrMissing,
// ErrCorrupt.
func (s *Store) Get(ctx context.Context, h Hash) ([]byte, error) { return nil, errNotBuilt }

// CopyTo writes the chunks' contents to w in order, each checked against its
// hash before it is written: ErrMissing, ErrCorrupt.
func (s *Store) CopyTo(ctx context.Context, w io.Writer, chunks []Hash) error { return errNotBuilt }

// List returns all that is stored, chunks and blobs, in no order.
func (s *Store) List(ctx context.Context) ([]Hash, error) { return nil, errNotBuilt }

// Refresh makes the Store forget what it knows of the server's content. Call
// it before a Put when another node may have collected.
func (s *Store) Refresh() {}

// Collect drops all that live does not want and returns how much it dropped;
// the parts of a live blob are kept with it. Only the primary may collect.
func (s *Store) Collect(ctx context.Context, live func(Hash) bool) (int, error) {
	return 0, errNotBuilt
}

// Beat is one heartbeat as it arrived.
type Beat struct {
	Role, Node string
	Run        uint64 // random for each StartBeacon
	N          uint64 // counts from 1 in each run
	At         time.Time
	Payload    []byte
}

// MaxBeatPayload is the most a heartbeat carries, in octets.
const MaxBeatPayload = 4096

// StartBeacon sends heartbeats until ctx or the Log ends. They are not stored.
// payload may be nil; it is called from the beacon's goroutine before each.
func (l *Log) StartBeacon(ctx context.Context, role, node string, every time.Duration, payload func() []byte) error {
	return errNotBuilt
}

// WatchBeats calls fn for each heartbeat of the service, of any role and node
// (one's own as well), from one goroutine, until ctx or the Log ends. It
// returns as soon as it listens.
func (l *Log) WatchBeats(ctx context.Context, fn func(Beat)) error { return errNotBuilt }

// Detector tells from the heartbeats of one node whether to suspect it. It is
// a plain value: no clock, no goroutine, not safe for concurrent use.
//
// Silence is counted only while Tick is called: when the watching process
// itself was stopped, the time it did not see proves nothing.
type Detector struct{}

// NewDetector suspects after timeout of silence; Tick is to be called at least
// every tick. A node never heard of is not suspected.
func NewDetector(timeout, tick time.Duration) *Detector { return &Detector{} }

// Observe takes note of a heartbeat that arrived at at.
func (d *Detector) Observe(at time.Time) {}

// Tick answers whether the node is to be suspected at at, and for how long it
// has been silent.
func (d *Detector) Tick(at time.Time) (suspect bool, silence time.Duration) { return false, 0 }
