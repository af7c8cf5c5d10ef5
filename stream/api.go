package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"time"
)

var errNotBuilt = errors.New("stream: not built yet")

// Config says where a service's log is and how it is kept.
//
// Exactly one of Server, Join and URL must be set.
type Config struct {
	// Service names the log: 1 to 32 of a-z, 0-9, '-' and '_', beginning with a
	// letter or digit.
	Service string

	// Server is an embedded server of this process.
	Server *Server
	// Join is the string of a server that StartServer runs on another host.
	Join string
	// URL is a NATS server or cluster of the user's own: nats:// or tls://,
	// several separated by commas.
	URL string

	// For URL only; at most one way of authentication.
	User, Password, Token, CredsFile string
	TLS                              *tls.Config // for tls://, nil: the system's roots

	// Replicas of the streams when they have to be created: 1 (also 0), 3 or 5.
	Replicas int
	// LogBytes is the size at which the log is full, when it has to be created; 0: 2 GiB.
	LogBytes int64
	// StoreBytes is the same for the checkpoint store; 0: no limit.
	StoreBytes int64
	// MaxBacklog bounds a Writer's memory, in octets that are not stable; 0: 256 MiB.
	MaxBacklog int
}

// Log is a service's log and checkpoint store on one server or cluster. It is
// safe for concurrent use.
type Log struct{}

// Open connects and creates the two streams where they are missing. It tries
// once. Errors: ErrUnreachable, ErrRefused, ErrFull (no room to create),
// ErrInvalid.
func Open(ctx context.Context, cfg Config) (*Log, error) { return nil, errNotBuilt }

// Close ends beacons, watches and the connection. Writers and Readers have
// connections of their own and are closed on their own.
func (l *Log) Close() error { return nil }

// URL is where the log is, for people; it carries no secret.
func (l *Log) URL() string { return "" }

// Status is what the server says about the log's stream.
type Status struct {
	Messages, Bytes, MaxBytes int64
	First, Last               StreamSeq
	Replicas                  int
	Leader                    string // "" when the server is no cluster
}

// Status asks the server.
func (l *Log) Status(ctx context.Context) (Status, error) { return Status{}, errNotBuilt }

// Fence is the licence of an epoch: the record that makes a node the primary.
type Fence struct {
	Epoch Epoch
	Node  string    // who
	At    time.Time // when, by that node's clock; for people only
	Seq   StreamSeq // its own place in the stream; not on the wire
	Prev  StreamSeq // the fence before it, 0 for the first
	Nonce [16]byte  // tells its author whether an ambiguous publish was stored
}

// LastFence reads the newest fence; ErrMissing when the service never had a
// primary. It is no proof of ownership: an isolated leader answers, too.
func (l *Log) LastFence(ctx context.Context) (Fence, error) { return Fence{}, errNotBuilt }

// Acquire makes node the primary, whoever was it before: it appends the fence
// of the next epoch and tries again until that has happened or ctx ends. Every
// older Writer is fenced from then on.
func (l *Log) Acquire(ctx context.Context, node string) (*Writer, error) { return nil, errNotBuilt }

// AcquireIf is Acquire unless the newest fence is another than prev (0: there
// is none): then it answers ErrFenced. Of several standbys that saw the same
// fence exactly one wins.
func (l *Log) AcquireIf(ctx context.Context, node string, prev StreamSeq) (*Writer, error) {
	return nil, errNotBuilt
}

// Writer appends to the log for one epoch. Its methods are safe for concurrent
// use, and none but Drain and Purge waits for the network.
//
// What it promises: a position is stable only when JetStream has acknowledged
// it and all before it; positions become stable in order; when the server
// cannot be reached or is full, nothing is lost or doubled, the Writer keeps
// trying for as long as it lives; only another node's fence (or Close) ends it.
type Writer struct{}

// Epoch is the tenure this Writer writes.
func (w *Writer) Epoch() Epoch { return 0 }

// Fence is the record that licences this Writer. A recovery reads the log up
// to Fence().Seq.
func (w *Writer) Fence() Fence { return Fence{} }

// Next is the position of the next record.
func (w *Writer) Next() Position { return 0 }

// Append puts r behind what was appended before; p must be Next. It encodes r
// before it returns, so the caller may use r's memory again, and never waits.
// Errors, none of which uses up the position: ErrOrder, ErrBacklog,
// ErrInvalid, ErrFenced, ErrClosed.
func (w *Writer) Append(p Position, r Record) error { return errNotBuilt }

// Stable is the position up to which, and with which, all is stable. Right
// after Acquire it is the last position of the epoch before.
func (w *Writer) Stable() Position { return 0 }

// Backlog is what was appended and is not stable yet.
func (w *Writer) Backlog() (records, bytes int) { return 0, 0 }

// OnStable sets the function that hears of every advance of Stable, in order,
// from the Writer's goroutine; it must not block. Set it before the first
// Append.
func (w *Writer) OnStable(f func(Position)) {}

// OnEnd sets the function that hears once that the Writer has ended, with
// ErrFenced or ErrClosed. If it already has, f is called at once.
func (w *Writer) OnEnd(f func(error)) {}

// WriterPhase is how a Writer is getting on.
type WriterPhase uint8

// How a Writer is getting on.
const (
	WriterOK      WriterPhase = iota // connected, or nothing to write yet
	WriterStalled                    // appends are held until the log answers again
	WriterFenced                     // ended: another node is the primary
	WriterClosed                     // ended by Close
)

// WriterState says how a Writer is getting on.
type WriterState struct {
	Phase WriterPhase
	Since time.Time // when Phase began
	Err   error     // why, wraps ErrUnreachable, ErrFull, ErrRefused, ErrFenced or ErrClosed; nil when OK
}

// State says how the Writer is getting on.
func (w *Writer) State() WriterState { return WriterState{} }

// SeqOf is the batch that holds a stable position of this epoch, and false for
// any other position and for one that Purge dropped. After very many batches
// without a Purge the answer may be an earlier batch, never a later one.
func (w *Writer) SeqOf(p Position) (StreamSeq, bool) { return 0, false }

// Drain waits until all that was appended is stable.
func (w *Writer) Drain(ctx context.Context) error { return errNotBuilt }

// Purge collects the batches before seq, in steps that stall appends for a few
// milliseconds. Fences stay, and so does the newest batch, whatever seq is.
func (w *Writer) Purge(ctx context.Context, before StreamSeq) error { return errNotBuilt }

// Close ends the Writer; what is not stable by then may or may not become so.
// It returns when its goroutine has ended.
func (w *Writer) Close() error { return nil }

// Entry is one step of the log: a record, or (Rec nil) a fence.
type Entry struct {
	Epoch Epoch
	Pos   Position  // of Rec; for a fence the last position before it
	Seq   StreamSeq // the message it came in
	Rec   Record    // its slices are the reader's to keep; nil for a fence
	Fence *Fence    // nil for a record
}

// Reader follows the log. It is for one goroutine; Close may come from any.
type Reader struct{}

// NewReader reads from the message from on; 0 and 1 mean the oldest there is.
func (l *Log) NewReader(ctx context.Context, from StreamSeq) (*Reader, error) { return nil, errNotBuilt }

// Next waits for the next entry. Records of an epoch older than the latest
// fence are dropped: they were never stable. A lost server is waited for and
// reading goes on where it stopped. Errors: ctx's, ErrClosed, ErrPurged,
// ErrHole, ErrCorrupt, ErrVersion, ErrRefused; all but ctx's are final.
func (r *Reader) Next(ctx context.Context) (Entry, error) { return Entry{}, errNotBuilt }

// Close ends a waiting Next.
func (r *Reader) Close() error { return nil }

// ReadTo gives fn every entry from the message from to the message to, that
// one included, as fast as it can, and returns. It ends early with fn's error.
func (l *Log) ReadTo(ctx context.Context, from, to StreamSeq, fn func(Entry) error) error {
	return errNotBuilt
}

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

// SyncMode is when the embedded server makes appends durable.
type SyncMode uint8

// When the embedded server makes appends durable.
const (
	SyncInterval SyncMode = iota // every second: a power loss costs the last second
	SyncAlways                   // before each acknowledgement: a power loss costs nothing
)

// ServerOptions are those of the embedded server.
type ServerOptions struct {
	// Listen is host:port; port 0 takes any. "" listens nowhere: this process
	// alone can use the server.
	Listen string
	// Advertise is host or host:port for the join string where Listen's is not
	// what others can dial (0.0.0.0); "" takes Listen, or for an unspecified
	// address this machine's first global one.
	Advertise string
	// StoreDir holds the streams, the certificate and the secret. It is made
	// 0700 and must belong to one server at a time.
	StoreDir string
	Sync     SyncMode
	// MinFree is the free space of StoreDir's file system, in octets, under
	// which State says low; 0: 512 MiB.
	MinFree uint64
	// OnSpace, if set, hears every change between enough and low space.
	OnSpace func(Space)
}

// Space is how much room the embedded server's store directory has. JetStream
// itself gives no error on a full disk, only silence.
type Space struct {
	Free uint64 // octets
	Low  bool
}

// Server is an embedded NATS server with JetStream, TLS and a secret.
type Server struct{}

// StartServer runs a server in this process. Certificate and secret are made
// at the first start in StoreDir and used again later, so that the join string
// stays the same.
func StartServer(o ServerOptions) (*Server, error) { return nil, errNotBuilt }

// JoinString is what another host's Config.Join takes: address, secret and
// certificate fingerprint. "" when the server listens nowhere.
func (s *Server) JoinString() string { return "" }

// Addr is the address it listens on; "" for nowhere.
func (s *Server) Addr() string { return "" }

// Space is the latest look at the store directory, at most a second old.
func (s *Server) Space() Space { return Space{} }

// Shutdown ends the server and waits until its files are closed.
func (s *Server) Shutdown() {}

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

// Join is a join string taken apart.
type Join struct {
	Addr        string   // host:port
	Secret      string   // 32 random octets in base64url
	Fingerprint [32]byte // SHA-256 of the server's certificate (DER)
}

// ParseJoin takes a join string apart: ErrInvalid.
func ParseJoin(s string) (Join, error) { return Join{}, errNotBuilt }

func (j Join) String() string { return "" }
