package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	defaultLogBytes   = 2 << 30
	defaultMaxBacklog = 256 << 20
)

// Log is a service's log and checkpoint store on one server or cluster. It is
// safe for concurrent use.
type Log struct {
	names names
	cfg   Config
	dial  *dialer

	mu     sync.Mutex
	ctl    *conn // questions; made again when lost
	bulk   *conn // checkpoint chunks
	spare  *conn // for the next Writer: a takeover should not wait for a handshake
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // beacons and watches
}

// Open connects and creates the two streams where they are missing. It tries
// once. Errors: ErrUnreachable, ErrRefused, ErrFull (no room to create),
// ErrInvalid.
func Open(ctx context.Context, cfg Config) (*Log, error) {
	n, err := newNames(cfg.Service)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	if cfg.Replicas < 0 || cfg.Replicas > 5 || cfg.LogBytes < 0 || cfg.StoreBytes < 0 || cfg.MaxBacklog < 0 {
		return nil, fmt.Errorf("open log: %w settings: negative sizes or %d replicas", ErrInvalid, cfg.Replicas)
	}
	if cfg.LogBytes == 0 {
		cfg.LogBytes = defaultLogBytes
	}
	if cfg.MaxBacklog == 0 {
		cfg.MaxBacklog = defaultMaxBacklog
	}
	d, err := newDialer(&cfg)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	l := &Log{names: n, cfg: cfg, dial: d}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	if err := l.create(ctx); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("open log: %w", err)
	}
	if cfg.Server != nil {
		// An interval sync comes too late for the stream itself: after a power
		// loss in its first second it would not be there at all.
		if err := cfg.Server.sync(); err != nil {
			_ = l.Close()
			return nil, fmt.Errorf("open log: %w", err)
		}
	}
	l.spare, err = l.dialWriter(ctx)
	if err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("open log: %w", err)
	}
	return l, nil
}

// Close ends beacons, watches and the connection. Writers and Readers have
// connections of their own and are closed on their own.
func (l *Log) Close() error {
	l.mu.Lock()
	l.cancel() // under the lock: no beacon or watch begins after it
	l.mu.Unlock()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []**conn{&l.ctl, &l.bulk, &l.spare} {
		(*c).close()
		*c = nil
	}
	return nil
}

// URL is where the log is, for people; it carries no secret.
func (l *Log) URL() string { return l.dial.show }

// shared returns one of the Log's own connections, made anew when it was lost.
func (l *Log) shared(ctx context.Context, c **conn, name string, how []nats.Option) (*conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return nil, fmt.Errorf("log: %w", ErrClosed)
	}
	if *c != nil && !(*c).nc.IsClosed() {
		return *c, nil
	}
	fresh, err := l.dial.connect(ctx, l.names.service+" "+name, how)
	if err != nil {
		return nil, err
	}
	*c = fresh
	return fresh, nil
}

func (l *Log) control(ctx context.Context) (*conn, error) {
	return l.shared(ctx, &l.ctl, "control", l.dial.quick)
}

// logConfig is the log's stream; docs/WIRE.md says why each setting is so.
func (l *Log) logConfig() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:        l.names.logStream,
		Description: "ftckpt log of service " + l.names.service,
		Subjects:    []string{l.names.data, l.names.fence},
		Storage:     jetstream.FileStorage,
		Replicas:    l.cfg.Replicas,
		Retention:   jetstream.LimitsPolicy,
		Discard:     jetstream.DiscardNew,
		MaxBytes:    l.cfg.LogBytes,
		DenyDelete:  true,
		Duplicates:  100 * time.Millisecond,
	}
}

func (l *Log) storeConfig() jetstream.StreamConfig {
	limit := l.cfg.StoreBytes
	if limit == 0 {
		limit = -1
	}
	return jetstream.StreamConfig{
		Name:                 l.names.storeStream,
		Description:          "ftckpt checkpoints of service " + l.names.service,
		Subjects:             []string{l.names.chunk + "*", l.names.blob + "*"},
		Storage:              jetstream.FileStorage,
		Replicas:             l.cfg.Replicas,
		Retention:            jetstream.LimitsPolicy,
		Discard:              jetstream.DiscardNew,
		DiscardNewPerSubject: true,
		MaxMsgsPerSubject:    1,
		MaxBytes:             limit,
		AllowDirect:          true,
		Duplicates:           100 * time.Millisecond,
	}
}

func (l *Log) create(ctx context.Context) error {
	c, err := l.control(ctx)
	if err != nil {
		return err
	}
	js, err := jetstream.New(c.nc)
	if err != nil {
		return err
	}
	if l.cfg.Replicas == 0 {
		l.cfg.Replicas = 1
		if c.nc.ConnectedClusterName() != "" {
			l.cfg.Replicas = 3
		}
	}
	for _, want := range []jetstream.StreamConfig{l.logConfig(), l.storeConfig()} {
		s, err := js.Stream(ctx, want.Name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			s, err = js.CreateStream(ctx, want)
			if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another node was faster, with other limits
				s, err = js.Stream(ctx, want.Name)
			}
		}
		if errors.Is(err, nats.ErrNoResponders) {
			return fmt.Errorf("%w: the server runs without JetStream; enable it there", ErrRefused)
		}
		if err != nil {
			return fmt.Errorf("create stream %s: %w", want.Name, classify(err))
		}
		if err := sameStream(s.CachedInfo().Config, want); err != nil {
			return err
		}
	}
	return nil
}

// sameStream holds a stream that was there to the settings that the
// guarantees rest on.
func sameStream(got, want jetstream.StreamConfig) error {
	bad := func(what string) error {
		return fmt.Errorf("%w: stream %s exists with another %s than ftckpt needs; delete it or use another service name", ErrRefused, got.Name, what)
	}
	switch {
	case !slices.Equal(got.Subjects, want.Subjects):
		return bad("list of subjects")
	case got.Discard != want.Discard || got.DiscardNewPerSubject != want.DiscardNewPerSubject:
		return bad("discard policy")
	case got.Retention != want.Retention:
		return bad("retention policy")
	case got.AllowDirect != want.AllowDirect:
		return bad("allow_direct")
	case want.DenyDelete && !got.DenyDelete:
		return bad("deny_delete")
	case got.DenyPurge:
		return bad("deny_purge")
	case got.MaxAge != 0 || got.MaxMsgs > 0 || want.MaxMsgsPerSubject != 0 && got.MaxMsgsPerSubject != want.MaxMsgsPerSubject ||
		want.MaxMsgsPerSubject == 0 && got.MaxMsgsPerSubject > 0:
		return bad("limit of age or messages")
	case got.NoAck:
		return bad("no_ack")
	case got.Mirror != nil || len(got.Sources) > 0 || got.SubjectTransform != nil || got.RePublish != nil:
		return bad("source or destination")
	}
	return nil
}

// Status is what the server says about the log's stream.
type Status struct {
	Messages, Bytes, MaxBytes int64
	First, Last               StreamSeq
	Replicas                  int
	Leader                    string        // "" when the server is no cluster
	Age                       time.Duration // of the newest message, by the server's clock; 0 when there is none
}

// Status asks the server.
func (l *Log) Status(ctx context.Context) (Status, error) {
	c, err := l.control(ctx)
	if err != nil {
		return Status{}, fmt.Errorf("log status: %w", err)
	}
	var r jetstream.StreamInfo
	if err := c.request(ctx, "$JS.API.STREAM.INFO."+l.names.logStream, struct{}{}, &r); err != nil {
		return Status{}, fmt.Errorf("log status: %w", err)
	}
	s := Status{
		Messages: int64(r.State.Msgs), Bytes: int64(r.State.Bytes), MaxBytes: r.Config.MaxBytes,
		First: StreamSeq(r.State.FirstSeq), Last: StreamSeq(r.State.LastSeq), Replicas: r.Config.Replicas,
	}
	if r.State.Msgs > 0 {
		s.Age = max(0, r.TimeStamp.Sub(r.State.LastTime))
	}
	if r.Cluster != nil && r.Cluster.Name != "" {
		s.Leader = r.Cluster.Leader
	}
	return s, nil
}

// Grow raises the log's limit by the given octets. A full log takes nothing,
// not even the record that would let it be collected; its owner may use this
// to get that record in. Acquire uses it for the fence.
func (l *Log) Grow(ctx context.Context, by int64) error {
	c, err := l.control(ctx)
	if err != nil {
		return fmt.Errorf("grow log: %w", err)
	}
	var r jetstream.StreamInfo
	if err := c.request(ctx, "$JS.API.STREAM.INFO."+l.names.logStream, struct{}{}, &r); err != nil {
		return fmt.Errorf("grow log: %w", err)
	}
	r.Config.MaxBytes += by
	var done jetstream.StreamInfo
	if err := c.request(ctx, "$JS.API.STREAM.UPDATE."+l.names.logStream, r.Config, &done); err != nil {
		return fmt.Errorf("grow log: %w", err)
	}
	return nil
}

// dialWriter makes the kind of connection a Writer uses. Its writes go to the
// socket at once instead of by way of nats.go's flusher: one goroutine less
// between an append and its acknowledgement.
func (l *Log) dialWriter(ctx context.Context) (*conn, error) {
	c, err := l.dial.connect(ctx, l.names.service+" writer", []nats.Option{nats.WriteBufferSize(1)})
	if err != nil {
		return nil, err
	}
	c.inbox = nats.NewInbox() + "."
	c.acks = make(chan *nats.Msg, 256)
	if _, err := c.nc.ChanSubscribe(c.inbox+"*", c.acks); err != nil {
		c.close()
		return nil, classify(err)
	}
	// Fences of others, as a hint (the machine reads the log to be sure).
	if _, err := c.nc.ChanSubscribe(l.names.fence, c.acks); err != nil {
		c.close()
		return nil, classify(err)
	}
	return c, nil
}

// takeSpare gives the connection that was kept ready, or a new one.
func (l *Log) takeSpare(ctx context.Context) (*conn, error) {
	l.mu.Lock()
	c := l.spare
	l.spare = nil
	l.mu.Unlock()
	if c != nil && !c.nc.IsClosed() {
		return c, nil
	}
	c.close()
	return l.dialWriter(ctx)
}
