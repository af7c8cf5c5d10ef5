package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// dumpTimeout bounds how long clients wait for a dump that does not come to an
// end; CRIU then lets go of the server and the generation has failed.
const dumpTimeout = 60 * time.Second

// errServerGone answers what is asked of a server that has died meanwhile.
var errServerGone = errors.New("the server process is gone")

// laggardTime is how long a generation waits for connections that lag.
const laggardTime = 10 * time.Second

// taken is a generation that this primary took, or was restored from.
type taken struct {
	gen      stream.Generation
	manifest checkpoint.Manifest
	at       time.Time
	logged   uint64 // client octets that this epoch had logged by its cut
}

// south is what the wrappers put into a manifest.
type south struct {
	NextConn stream.ConnID `json:"next_conn"`
	// AgeMS is the time from the dump to the writing of the manifest: with it a
	// standby knows how far the timestamp clocks in the image lie behind, however
	// the two hosts' clocks differ.
	AgeMS int64 `json:"age_ms"`
	// Unaccepted are connections that waited in the accept queue: no image has
	// them, and a recovery has to re-create them.
	Unaccepted []stream.ConnID `json:"unaccepted,omitempty"`
	// Dialling are connections that the server had begun to open: the image has
	// their sockets, the log their answers, if any.
	Dialling []stream.ConnID `json:"dialling,omitempty"`
	// Translated says how the numbers of connections that were made again here, in
	// the image, differ from those that their clients know.
	Translated map[stream.ConnID]tcpwrap.Translation `json:"translated,omitempty"`
	// Expired are connections of the image that are not protected.
	Expired []stream.ConnID `json:"expired,omitempty"`
	// Closing are connections that the server has closed, with which TCP is not
	// done: their sockets are nobody's, and no image has them.
	Closing []tcpwrap.Cut `json:"closing,omitempty"`
	// Service is the Hello of the epoch, which the log's collection does not keep.
	Service json.RawMessage `json:"service"`
}

func parseSouth(b []byte) (south, error) {
	var s south
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("read the wrappers' part of the manifest: %w", err)
	}
	if s.AgeMS < 0 || s.AgeMS > int64(24*time.Hour/time.Millisecond) {
		return s, fmt.Errorf("read the wrappers' part of the manifest: age %d ms", s.AgeMS)
	}
	for id, t := range s.Translated {
		if err := checkTranslation(t); err != nil {
			return s, fmt.Errorf("read the wrappers' part of the manifest: connection %d: %w", id, err)
		}
	}
	return s, nil
}

// service is the service that a manifest is of.
func (s south) service() (service, error) { return parseService(s.Service) }

// generation takes one and returns when it is stable, so that a standby can
// begin with it. After an error the server runs on and nothing is held.
func (p *primary) generation(ctx context.Context) (control.CheckpointResult, error) {
	res, err := p.takeGeneration(ctx)
	p.mu.Lock()
	p.genErr = err
	p.mu.Unlock()
	if err == nil {
		if gerr := p.collect(ctx); gerr != nil && ctx.Err() == nil {
			p.log.Warn("collect garbage behind the new generation; the next one tries again", "err", gerr)
		}
	}
	return res, err
}

func (p *primary) takeGeneration(ctx context.Context) (control.CheckpointResult, error) {
	var res control.CheckpointResult
	if st := p.w.State(); st.Phase != stream.WriterOK {
		return res, fmt.Errorf("the log is not available: %w", st.Err)
	}
	id := p.lastID + 1
	dir := filepath.Join(p.dir, fmt.Sprintf("gen-%d", id))
	if err := os.RemoveAll(dir); err != nil {
		return res, fmt.Errorf("make room for generation %d: %w", id, err)
	}
	p.awaitLaggards(ctx)
	p.sweepTranslated()
	if err := p.awaitOwing(ctx); err != nil {
		return res, fmt.Errorf("look for connections that are being closed: %w", err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			p.log.Warn("remove an image", "err", err)
		}
	}()

	m, err := p.dump(ctx, id, dir)
	if err != nil {
		return res, err
	}
	at := time.Now()
	if err := p.trust(ctx); err != nil {
		return res, fmt.Errorf("upload generation %d: %w", id, err)
	}
	if m.Image, _, err = checkpoint.Upload(ctx, p.store, dir); err != nil {
		return res, fmt.Errorf("upload generation %d: %w", id, err)
	}
	gen, err := p.publish(ctx, m, at)
	if err != nil {
		return res, err
	}
	p.mu.Lock()
	p.lastID = id
	p.gen = taken{gen, m, at, p.cutLogged}
	p.kept = append(p.kept, p.gen)
	if p.since.IsZero() {
		p.since = time.Now()
	}
	p.mu.Unlock()
	p.log.Debug("generation is stable", "generation", id, "connections", len(m.Conns), "pause_us", m.PauseUS, "bytes", m.ImageBytes)
	return control.CheckpointResult{ID: id, Bytes: uint64(m.ImageBytes), PauseUS: m.PauseUS}, nil
}

// awaitLaggards gives connections that a takeover has not brought up to date yet
// some time: the engine feeds them, and a dump would cut through that.
func (p *primary) awaitLaggards(ctx context.Context) {
	lagging := func() (yes bool) {
		p.drv.with(func() { yes = p.drv.engine != nil && p.drv.engine.Lagging() > 0 })
		return yes
	}
	for end := time.Now().Add(laggardTime); lagging() && time.Now().Before(end) && ctx.Err() == nil; {
		sleep(ctx, 4*tickEvery)
	}
}

// dump cuts through the connections: packets wait from just before the freeze
// until the machine knows where each connection stands in the image.
func (p *primary) dump(ctx context.Context, id uint64, dir string) (checkpoint.Manifest, error) {
	m := checkpoint.Manifest{ID: id, Service: p.svc.Name, Epoch: p.w.Epoch(), Created: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, dumpTimeout)
	defer cancel()
	var held time.Time
	d, err := p.criu.Dump(ctx, checkpoint.DumpRequest{
		PID: p.where.pid, InitPID: p.where.initPID, Dir: dir,
		Hold: func() error {
			held = time.Now()
			lagging := 0
			p.drv.with(func() {
				if e := p.drv.engine; e != nil {
					lagging = e.Lagging()
				}
				if lagging == 0 {
					m.Cut = p.drv.machine.Freeze()
					p.cutLogged = p.drv.machine.Stats().LoggedBytes
				}
			})
			if lagging > 0 {
				return fmt.Errorf("%d connections are still being brought up to date", lagging)
			}
			return nil
		},
	})
	var socks []checkpoint.Socket
	if err == nil {
		socks, err = checkpoint.ReadSockets(dir)
	}
	p.drv.with(func() {
		sth := south{Service: p.svc.hello()}
		if err == nil {
			var missing []tcpwrap.Missing
			var from stream.Position
			m.Conns, m.From, missing = adopt(p.drv.machine, p.svc, socks, m.Cut, p.drv.dp.Get)
			sth.Translated = translatedOf(m.Conns, p.drv.dp.Get)
			var a absent
			a, err = classify(p.where.netns, p.svc, missing, p.drv.dp.Get)
			sth.Unaccepted, sth.Closing = a.unaccepted, a.closing
			sth.Expired = p.drv.machine.Expired()
			if a.from != 0 {
				m.From = min(m.From, a.from)
			}
			for _, t := range a.gone {
				p.drv.machine.Gone(t)
			}
			sth.Dialling, from = dialling(p.drv.machine, p.svc, socks)
			m.From = min(m.From, from)
			if e := p.drv.engine; e != nil { // what a takeover still waits for
				for _, u := range e.Unanswered() {
					sth.Unaccepted = append(sth.Unaccepted, u.Conn)
					m.From = min(m.From, u.Open)
				}
			}
		}
		sth.NextConn = p.drv.machine.NextConn()
		m.South, _ = json.Marshal(sth) // plain data always encodes
		p.drv.machine.Thaw(time.Now())
	})
	if err != nil {
		return m, fmt.Errorf("take generation %d: %w", id, err)
	}
	m.PauseUS, m.ImageBytes = time.Since(held).Microseconds(), d.Bytes
	p.tellOutgoing(outgoing(p.svc, socks))
	if m.SocketOptions, err = checkpoint.ReadSocketOptions(p.where.pid, socks); err != nil {
		p.log.Warn("after a takeover from this generation some socket options will be the system's defaults", "generation", id, "err", err)
	}
	if m.Tree, err = checkpoint.ReadTree(dir); err != nil {
		return m, fmt.Errorf("take generation %d: %w", id, err)
	}
	if m.Target, m.Files, err = checkpoint.CollectFacts(dir, p.where.pid, p.criu, &p.hasher); err != nil {
		return m, fmt.Errorf("take generation %d: %w", id, err)
	}
	return m, nil
}

// adopt tells the machine where the image's connections stand. What the manifest
// says of them is as in the image; the machine speaks the clients' numbers.
func adopt(m *tcpwrap.Machine, svc service, socks []checkpoint.Socket, at stream.Position, translated func(stream.FourTuple) (tcpwrap.Translation, bool)) (conns []checkpoint.ConnCut, from stream.Position, missing []tcpwrap.Missing) {
	var cuts []tcpwrap.Cut
	byTuple := map[stream.FourTuple]checkpoint.Socket{}
	for _, s := range socks {
		if carried(svc, s) {
			c := cutOf(svc, s)
			if t, yes := translated(s.Tuple); yes {
				c = t.Cut(c)
			}
			cuts = append(cuts, c)
			byTuple[c.Tuple] = s
		}
	}
	adopted, from := m.Adopt(cuts)
	for _, c := range adopted {
		k := byTuple[c.Tuple].Cut(c.Conn)
		if c.Urgent {
			k.SndUp = &c.ServerUp
		}
		conns = append(conns, k)
	}
	return conns, min(from, at), m.Missing(adopted)
}

// carried reports whether a socket of an image is a connection of the service
// that a recovery brings back.
func carried(svc service, s checkpoint.Socket) bool {
	return connected(s) && (svc.serves(s.Tuple) || svc.dialled(s.Tuple))
}

// connected reports whether a socket of an image is a TCP connection with a peer
// that may still speak.
func connected(s checkpoint.Socket) bool {
	switch s.State {
	case checkpoint.Established, checkpoint.FinWait1, checkpoint.FinWait2, checkpoint.CloseWait, checkpoint.LastAck, checkpoint.Closing:
		return s.Stream
	}
	return false
}

func cutOf(svc service, s checkpoint.Socket) tcpwrap.Cut {
	clientFin := s.State == checkpoint.CloseWait || s.State == checkpoint.LastAck || s.State == checkpoint.Closing
	serverFin := s.State == checkpoint.FinWait1 || s.State == checkpoint.FinWait2 || s.State == checkpoint.LastAck || s.State == checkpoint.Closing
	var offered seqnum.Size
	if edge := s.RcvWup.Add(seqnum.Size(s.RcvWnd)); s.RcvNxt.Less(edge) {
		offered = s.RcvNxt.To(edge)
	}
	return tcpwrap.Cut{
		Tuple: s.Tuple, RcvNxt: s.RcvNxt, SndUna: s.SndUna, SndNxt: s.SndNxt, SndWnd: seqnum.Size(s.SndWnd),
		SndWScale: s.SndWScale, RcvWScale: s.RcvWScale,
		HasTS: s.Options&checkpoint.OptTimestamps != 0, ServerTS: s.Timestamp,
		ClientFin: clientFin, ServerFin: serverFin, Dialled: svc.dialled(s.Tuple),
		RcvWnd: offered,
	}
}

// publish makes the generation count: manifest first, then its record.
func (p *primary) publish(ctx context.Context, m checkpoint.Manifest, at time.Time) (stream.Generation, error) {
	var gen stream.Generation
	if err := p.stableTo(ctx, m.Cut); err != nil {
		return gen, err
	}
	seq, ok := p.w.SeqOf(m.From)
	if !ok && m.From < p.first {
		// A connection that a takeover brought here still waits to be accepted: its
		// records are of an epoch before, and the generation of then has them.
		p.mu.Lock()
		seq, ok = p.gen.gen.FromSeq, p.gen.gen.ID != 0
		p.mu.Unlock()
	}
	if !ok {
		return gen, fmt.Errorf("publish generation %d: no batch holds position %d", m.ID, m.From)
	}
	m.FromSeq = seq
	var s south
	_ = json.Unmarshal(m.South, &s) // our own
	s.AgeMS = time.Since(at).Milliseconds() + m.PauseUS/1000
	m.South, _ = json.Marshal(s)
	b, err := m.Encode()
	if err != nil {
		return gen, err
	}
	h, err := p.store.PutBlob(ctx, b)
	if err != nil {
		return gen, fmt.Errorf("store manifest of generation %d: %w", m.ID, err)
	}
	// Before the record: once that is stable, the survey is known to be older than
	// any other primary's fence, and what is dropped by it is nobody else's.
	p.survey = nil
	if then, err := p.store.Survey(ctx); err == nil {
		p.survey = &then
	} else {
		p.log.Warn("no chunks will be collected behind this generation", "err", err)
	}
	gen = stream.Generation{ID: m.ID, Manifest: h, Cut: m.Cut, From: m.From, FromSeq: seq}
	var pos stream.Position
	p.drv.with(func() { pos = p.drv.machine.Append(gen) })
	return gen, p.stableTo(ctx, pos)
}

// stableTo waits until the log is stable up to pos.
func (p *primary) stableTo(ctx context.Context, pos stream.Position) error {
	if err := p.w.Drain(ctx); err != nil {
		return fmt.Errorf("wait for the log: %w", err)
	}
	if p.w.Stable() < pos { // a writer that has ended takes no record, and has nothing to drain
		return fmt.Errorf("wait for the log: it did not take record %d: %w", pos, p.w.State().Err)
	}
	return nil
}

// collect drops what no kept generation needs.
func (p *primary) collect(ctx context.Context) error {
	p.mu.Lock()
	kept := append([]taken(nil), p.kept...)
	p.mu.Unlock()
	var gens []stream.Generation
	manifests := map[stream.Hash]checkpoint.Manifest{}
	for _, t := range kept {
		gens = append(gens, t.gen)
		manifests[t.gen.Manifest] = t.manifest
	}
	r := checkpoint.Retain(gens, nil, checkpoint.KeepGenerations)
	if r.PurgeBefore > 0 {
		if err := p.w.Purge(ctx, r.PurgeBefore); err != nil {
			return fmt.Errorf("purge the log before %d: %w", r.PurgeBefore, err)
		}
	}
	if live, ok := checkpoint.Live(r.Keep, manifests); ok && r.Collect && p.survey != nil {
		if _, err := p.store.Collect(ctx, *p.survey, func(h stream.Hash) bool { return live[h] }); err != nil {
			return fmt.Errorf("collect chunks: %w", err)
		}
	}
	still := map[uint64]bool{}
	for _, g := range r.Keep {
		still[g.ID] = true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var rest []taken
	for _, t := range p.kept {
		if still[t.gen.ID] {
			rest = append(rest, t)
		}
	}
	p.kept = rest
	return nil
}

// Checkpoint implements control.Handler.
func (p *primary) Checkpoint(ctx context.Context) (control.CheckpointResult, error) {
	answer := make(chan generationAnswer, 1)
	select {
	case p.wanted <- wanted{answer}:
	case <-p.exited:
		return control.CheckpointResult{}, errServerGone
	case <-ctx.Done():
		return control.CheckpointResult{}, ctx.Err()
	}
	select {
	case a := <-answer:
		return a.res, a.err
	case <-ctx.Done():
		return control.CheckpointResult{}, ctx.Err()
	}
}
