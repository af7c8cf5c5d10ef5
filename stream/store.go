package stream

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// StoreOptions says how to store.
type StoreOptions struct {
	// Compress packs each chunk with zstd where that makes it smaller.
	Compress bool
}

// Store keeps checkpoint images as chunks by content. It is safe for
// concurrent use, but for Collect, which must not run beside a Put.
//
// A chunk that turned out corrupt stays so, and is not sent again, until a
// Collect whose live function does not want it.
type Store struct {
	log  *Log
	pack *packer

	mu    sync.Mutex
	known map[Hash]struct{} // on the server; nil: not asked yet
	// On the server as well, in messages up to staleTo, but not to be relied upon.
	stale   map[Hash]struct{}
	staleTo uint64
	trusted func(Hash) bool // nil: all
}

// Store gives access to the service's checkpoint store.
func (l *Log) Store(o StoreOptions) *Store {
	p, err := newPacker(o.Compress)
	if err != nil {
		panic(err) // only for options out of range, and they are constants
	}
	return &Store{log: l, pack: p}
}

func (s *Store) exchange() *exchange {
	return newExchange(func(ctx context.Context) (*conn, error) {
		return s.log.shared(ctx, &s.log.bulk, "store", nil)
	})
}

// Trust says which of the chunks that are there may be relied upon: those of a
// generation that every earlier primary keeps, too. Any other is stored anew when
// it is needed, since an earlier primary, stopped in the midst of a Collect, may
// still drop it. Call it when a tenure begins. Without it all is trusted.
func (s *Store) Trust(trusted func(Hash) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trusted, s.known = trusted, nil
}

// Refresh makes the Store forget what it knows of the server's content. Call
// it before a Put when another node may have collected.
func (s *Store) Refresh() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = nil
}

// Learn asks the server what it has, unless that is known. The first Put does so,
// too; but after Trust a record that was appended to the log behind Learn has to be
// stable before the first Put, as for Collect.
func (s *Store) Learn(ctx context.Context) error {
	if err := s.learn(ctx); err != nil {
		return fmt.Errorf("list store: %w", err)
	}
	return nil
}

// learn asks the server what it has, once.
func (s *Store) learn(ctx context.Context) error {
	s.mu.Lock()
	have := s.known != nil
	s.mu.Unlock()
	if have {
		return nil
	}
	all, err := s.list(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known, s.stale, s.staleTo = make(map[Hash]struct{}, len(all.chunks)), make(map[Hash]struct{}), all.last
	for _, h := range all.chunks {
		if s.trusted == nil || s.trusted(h) {
			s.known[h] = struct{}{}
		} else {
			s.stale[h] = struct{}{}
		}
	}
	return nil
}

func (s *Store) knows(h Hash) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.known[h]
	return ok
}

func (s *Store) note(h Hash) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known != nil {
		s.known[h] = struct{}{}
	}
}

// PutReader stores all of r in chunks and returns their hashes in order, when
// all are stored, and how many octets it had to send. Chunks that the store
// has are not sent again. Errors: r's, ErrFull, ErrUnreachable, ctx's.
func (s *Store) PutReader(ctx context.Context, r io.Reader) (chunks []Hash, sent int64, err error) {
	if err := s.learn(ctx); err != nil {
		return nil, 0, fmt.Errorf("store chunks: %w", err)
	}
	x := s.exchange()
	defer x.close()
	sending := make(map[Hash]struct{})
	buf := make([]byte, ChunkSize)
	for {
		n, rerr := io.ReadFull(r, buf)
		if n > 0 {
			h := Sum(buf[:n])
			chunks = append(chunks, h)
			if _, twice := sending[h]; !twice && !s.knows(h) {
				sending[h] = struct{}{}
				if err := s.renew(ctx, h); err != nil {
					return nil, sent, fmt.Errorf("store chunks: %w", err)
				}
				m := s.pack.packChunk(buf[:n])
				sent += int64(len(m))
				if err := s.put(ctx, x, s.log.names.chunk+h.String(), m, func() { s.note(h) }); err != nil {
					return nil, sent, fmt.Errorf("store chunks: %w", err)
				}
			}
		}
		if rerr == io.EOF || rerr == io.ErrUnexpectedEOF {
			break
		}
		if rerr != nil {
			return nil, sent, fmt.Errorf("store chunks: %w", rerr)
		}
	}
	if err := x.flush(ctx); err != nil {
		return nil, sent, fmt.Errorf("store chunks: %w", err)
	}
	return chunks, sent, nil
}

// renew makes room for a chunk whose message an earlier primary may be about to
// drop. That one drops nothing that was stored after our fence, so a new message
// is safe from it. The bound keeps the request from harm if it is done twice.
func (s *Store) renew(ctx context.Context, h Hash) error {
	s.mu.Lock()
	_, stale := s.stale[h]
	to := s.staleTo
	s.mu.Unlock()
	if !stale {
		return nil
	}
	c, err := s.log.control(ctx)
	if err != nil {
		return err
	}
	var r struct{}
	ask := map[string]any{"filter": s.log.names.chunk + h.String(), "seq": to + 1}
	if err := c.request(ctx, "$JS.API.STREAM.PURGE."+s.log.names.storeStream, ask, &r); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.stale, h)
	s.mu.Unlock()
	return nil
}

// put sends one message; that the subject has one already is as good.
func (s *Store) put(ctx context.Context, x *exchange, subject string, m []byte, stored func()) error {
	return x.send(ctx, subject, m, func(answer *nats.Msg) error {
		_, err := parseAck(answer)
		var api *jetstream.APIError
		if errors.As(err, &api) && api.ErrorCode == apiStoreFailed && strings.Contains(api.Description, "messages per subject") {
			err = nil
		}
		if err == nil {
			stored()
		}
		return err
	})
}

// PutBlob stores b, at most MaxBlob octets, under one hash: a manifest.
func (s *Store) PutBlob(ctx context.Context, b []byte) (Hash, error) {
	if len(b) > MaxBlob {
		return Hash{}, fmt.Errorf("store blob: %w: %d octets are more than %d", ErrInvalid, len(b), MaxBlob)
	}
	h := Sum(b)
	x := s.exchange()
	defer x.close()
	subject := s.log.names.chunk + h.String()
	var m []byte
	if len(b) <= ChunkSize {
		m = s.pack.packChunk(b)
	} else {
		parts, _, err := s.PutReader(ctx, strings.NewReader(string(b)))
		if err != nil {
			return Hash{}, fmt.Errorf("store blob: %w", err)
		}
		subject, m = s.log.names.blob+h.String(), packIndexOf(len(b), parts)
	}
	err := s.put(ctx, x, subject, m, func() {})
	if err == nil {
		err = x.flush(ctx)
	}
	if err != nil {
		return Hash{}, fmt.Errorf("store blob: %w", err)
	}
	return h, nil
}

// ask puts a direct read of subject in flight. A replica that has nothing may
// only be behind, so the leader has the last word.
func (s *Store) ask(ctx context.Context, x *exchange, subject string, done func(m []byte, err error) error) error {
	stream := s.log.names.storeStream
	return x.send(ctx, "$JS.API.DIRECT.GET."+stream+"."+subject, nil, func(m *nats.Msg) error {
		switch m.Header.Get("Status") {
		case "":
			return done(m.Data, nil)
		case "404":
			raw, err := x.conn.getMsg(ctx, stream, map[string]any{"last_by_subj": subject})
			return done(raw.Data, err)
		}
		return done(nil, fmt.Errorf("%w: read %s: %s", ErrRefused, subject, m.Header.Get("Description")))
	})
}

// Get reads a chunk or a blob and checks it against its hash: ErrMissing,
// ErrCorrupt.
func (s *Store) Get(ctx context.Context, h Hash) ([]byte, error) {
	b, err := s.get(ctx, h)
	if err != nil {
		return nil, fmt.Errorf("read from store %s: %w", h, err)
	}
	return b, nil
}

func (s *Store) get(ctx context.Context, h Hash) ([]byte, error) {
	m, err := s.one(ctx, s.log.names.chunk+h.String())
	if err == nil {
		return s.pack.unpackChunk(m, h)
	}
	if !errors.Is(err, ErrMissing) {
		return nil, err
	}
	if m, err = s.one(ctx, s.log.names.blob+h.String()); err != nil {
		return nil, err
	}
	size, parts, err := unpackIndex(m, h)
	if err != nil {
		return nil, err
	}
	b := &sliceWriter{b: make([]byte, 0, size)}
	if err := s.CopyTo(ctx, b, parts); err != nil {
		return nil, err
	}
	if len(b.b) != size || Sum(b.b) != h {
		return nil, fmt.Errorf("%w blob: its content has another hash", ErrCorrupt)
	}
	return b.b, nil
}

type sliceWriter struct{ b []byte }

func (w *sliceWriter) Write(p []byte) (int, error) {
	w.b = append(w.b, p...)
	return len(p), nil
}

func (s *Store) one(ctx context.Context, subject string) (m []byte, err error) {
	x := s.exchange()
	defer x.close()
	err = s.ask(ctx, x, subject, func(b []byte, err error) error {
		m = b
		return err
	})
	if err == nil {
		err = x.flush(ctx)
	}
	return m, err
}

// CopyTo writes the chunks' contents to w in order, each checked against its
// hash before it is written: ErrMissing, ErrCorrupt.
func (s *Store) CopyTo(ctx context.Context, w io.Writer, chunks []Hash) error {
	x := s.exchange()
	defer x.close()
	got := make(map[int][]byte, window) // arrived, not yet written
	written := 0
	drain := func() error {
		for m, ok := got[written]; ok; m, ok = got[written] {
			b, err := s.pack.unpackChunk(m, chunks[written])
			if err != nil {
				return err
			}
			if _, err := w.Write(b); err != nil {
				return err
			}
			delete(got, written)
			written++
		}
		return nil
	}
	for i, h := range chunks {
		for i-written >= window {
			if err := x.receive(ctx); err != nil {
				return fmt.Errorf("read chunks: %w", err)
			}
		}
		err := s.ask(ctx, x, s.log.names.chunk+h.String(), func(m []byte, err error) error {
			if err != nil {
				return fmt.Errorf("chunk %s: %w", h, err)
			}
			got[i] = m
			return drain()
		})
		if err != nil {
			return fmt.Errorf("read chunks: %w", err)
		}
	}
	if err := x.flush(ctx); err != nil {
		return fmt.Errorf("read chunks: %w", err)
	}
	return nil
}

// List returns all that is stored, chunks and blobs, in no order.
func (s *Store) List(ctx context.Context) ([]Hash, error) {
	all, err := s.list(ctx)
	if err != nil {
		return nil, fmt.Errorf("list store: %w", err)
	}
	return append(all.chunks, all.blobs...), nil
}

// listTimeout is for one page, of up to 100,000 subjects.
const listTimeout = 10 * time.Second

// Survey is what there was in a store at some time.
type Survey struct {
	chunks, blobs []Hash
	last          uint64 // sequence of the newest message then, or of an older one
}

// Survey lists the store for a Collect to come.
func (s *Store) Survey(ctx context.Context) (Survey, error) {
	all, err := s.list(ctx)
	if err != nil {
		return Survey{}, fmt.Errorf("list store: %w", err)
	}
	return all, nil
}

func (s *Store) list(ctx context.Context) (all Survey, err error) {
	c, err := s.log.control(ctx)
	if err != nil {
		return Survey{}, err
	}
	n := &s.log.names
	for offset := 0; ; {
		var r struct {
			Total int `json:"total"`
			State struct {
				Subjects map[string]uint64 `json:"subjects"`
				Last     uint64            `json:"last_seq"`
			} `json:"state"`
		}
		ask := map[string]any{"subjects_filter": ">", "offset": offset}
		if err := c.requestIn(ctx, listTimeout, "$JS.API.STREAM.INFO."+n.storeStream, ask, &r); err != nil {
			return Survey{}, err
		}
		if offset == 0 {
			all.last = r.State.Last
		}
		for subject := range r.State.Subjects {
			if h, ok := hashOf(subject, n.chunk); ok {
				all.chunks = append(all.chunks, h)
			} else if h, ok := hashOf(subject, n.blob); ok {
				all.blobs = append(all.blobs, h)
			}
		}
		offset += len(r.State.Subjects)
		if len(r.State.Subjects) == 0 || offset >= r.Total {
			return all, nil
		}
	}
}

func hashOf(subject, prefix string) (h Hash, ok bool) {
	x, ok := strings.CutPrefix(subject, prefix)
	if !ok || len(x) != 2*HashSize {
		return h, false
	}
	_, err := hex.Decode(h[:], []byte(x))
	return h, err == nil
}

// Collect drops of what was there then all that live does not want, and returns
// how much it dropped; the parts of a live blob are kept with it. Nothing stored
// after the Survey is touched.
//
// Only the primary may collect, and nobody can know that he still is: a host may
// be stopped in the midst of this and go on after a takeover. So something has to
// be appended to the log after the Survey and to be stable before Collect: it
// shows that the Survey is older than the fence of any other primary. See Trust
// for the other half.
func (s *Store) Collect(ctx context.Context, then Survey, live func(Hash) bool) (int, error) {
	n, err := s.collect(ctx, then, live)
	if err != nil {
		return n, fmt.Errorf("collect store: %w", err)
	}
	return n, nil
}

func (s *Store) collect(ctx context.Context, then Survey, live func(Hash) bool) (n int, err error) {
	parts := make(map[Hash]struct{})
	var dead []string
	for _, h := range then.blobs {
		if !live(h) {
			dead = append(dead, s.log.names.blob+h.String())
			continue
		}
		m, err := s.one(ctx, s.log.names.blob+h.String())
		if err != nil {
			return 0, err
		}
		// An index that cannot be read must not cost its parts: nothing is dropped.
		_, hs, err := unpackIndex(m, h)
		if err != nil {
			return 0, err
		}
		for _, p := range hs {
			parts[p] = struct{}{}
		}
	}
	var gone []Hash
	for _, h := range then.chunks {
		if _, part := parts[h]; !part && !live(h) {
			dead = append(dead, s.log.names.chunk+h.String())
			gone = append(gone, h)
		}
	}
	s.mu.Lock()
	for _, h := range gone { // before it is true, lest a Put trusts it
		delete(s.known, h)
	}
	s.mu.Unlock()
	x := s.exchange()
	defer x.close()
	for _, subject := range dead {
		ask, err := json.Marshal(map[string]any{"filter": subject, "seq": then.last + 1})
		if err != nil {
			return n, err
		}
		err = x.send(ctx, "$JS.API.STREAM.PURGE."+s.log.names.storeStream, ask, func(m *nats.Msg) error {
			var r struct {
				Error *jetstream.APIError `json:"error"`
			}
			if err := json.Unmarshal(m.Data, &r); err != nil {
				return fmt.Errorf("%w answer of the server: %w", ErrCorrupt, err)
			}
			if r.Error != nil {
				return classify(r.Error)
			}
			n++
			return nil
		})
		if err != nil {
			return n, err
		}
	}
	return n, x.flush(ctx)
}
