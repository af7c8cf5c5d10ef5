package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	// fenceTime bounds one attempt to fence; a log that does not answer is no
	// reason to give up, so attempts are repeated.
	fenceTime = 5 * time.Second
	// quietTime is how long a replay may make no progress before the connections
	// that have not caught up are given up.
	quietTime = 5 * time.Second
	// clockMargin, in the milliseconds of Linux's timestamp clock, is by how much
	// a restored clock runs ahead of the estimate: the estimate is late by the
	// time a record takes to get here, and a clock that goes back makes clients
	// discard everything (PAWS, RFC 7323, 5).
	clockMargin = 200
	// unknownSilence is taken for an outage that began before this standby did.
	unknownSilence = time.Minute
)

// errStillPrimary says that there is nothing to take over.
var errStillPrimary = errors.New("another node is the primary")

// clock measures the steps of a takeover.
type clock struct {
	log   *slog.Logger
	start time.Time // of the silence
	last  time.Time
	t     control.Takeover
}

func (c *clock) step(event string, to *float64, args ...any) {
	now := time.Now()
	*to = float64(now.Sub(c.last).Microseconds()) / 1000
	c.last = now
	c.log.Info(event, append([]any{"event", event, "ms", *to}, args...)...)
}

// takeOver makes this node the primary: fence, address, restore, roll forward,
// live (architecture.md, "A takeover"). It returns errStillPrimary when another
// node has won, and otherwise when the tenure that begins here ends.
func (s *standby) takeOver(ctx context.Context, why string, since time.Time) error {
	c := &clock{log: s.log, start: since, last: since}
	c.step("suspect", &c.t.DetectMS, "why", why)

	s.mu.Lock()
	prev := s.ledger.Fence.Seq
	s.taking = true
	candidates := []local{s.local, s.before}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.taking = false
		s.mu.Unlock()
	}()

	fctx, cancel := context.WithTimeout(ctx, fenceTime)
	w, err := s.lg.AcquireIf(fctx, s.node, prev)
	cancel()
	switch {
	case errors.Is(err, stream.ErrFenced):
		return fmt.Errorf("%w: %w", errStillPrimary, err)
	case err != nil:
		s.log.Error("cannot fence the primary; trying again", "err", err)
		return fmt.Errorf("%w, as far as can be told: %w", errStillPrimary, err)
	}
	c.step("fenced", &c.t.FenceMS, "epoch", w.Epoch())
	// From here on other standbys hear of us, however long a recovery takes.
	bctx, hush := context.WithCancel(ctx)
	defer hush()
	go insist(bctx, s.log, "start heartbeat", func() error {
		return s.lg.StartBeacon(bctx, roles.Primary, s.node, roles.BeatEvery, func() []byte { return s.reignBeat(w) })
	})
	actx, end := context.WithCancelCause(ctx)
	defer end(nil)
	w.OnEnd(end)
	p, err := s.recoverFrom(actx, c, w, candidates, end)
	if err != nil {
		_ = w.Close()
		if cause := errors.Join(err, context.Cause(actx)); errors.Is(cause, stream.ErrFenced) {
			return exitcode.Wrap(exitcode.Fenced, fmt.Errorf("take over %s: another node was faster: %w", s.cfg.Name, cause))
		}
		// The old primary is fenced and this node cannot go on: clients are told
		// nothing, so that another standby may still save them.
		return exitcode.Wrap(exitcode.Failed, fmt.Errorf("take over %s: %w", s.cfg.Name, err))
	}
	p.beating, p.local = true, s.restores
	return s.reign(ctx, p)
}

// reignBeat is the heartbeat of a node that has fenced the primary: while it
// takes over, and as the primary that it then is.
func (s *standby) reignBeat(w *stream.Writer) []byte {
	s.mu.Lock()
	p := s.primary
	s.mu.Unlock()
	if p != nil {
		return p.beat()
	}
	b, _ := json.Marshal(primaryBeat{Epoch: w.Epoch(), TakingOver: true}) // plain data always encodes
	return b
}

// reign is this node's tenure as primary.
func (s *standby) reign(ctx context.Context, p *primary) error {
	s.mu.Lock()
	s.primary = p
	s.mu.Unlock()
	err := p.run(ctx)
	if p.spared {
		s.release()
	}
	_ = os.RemoveAll(p.dir)
	return err
}

// recovery is one takeover under way.
type recovery struct {
	*standby
	clock *clock
	w     *stream.Writer
	loc   local
	svc   service

	ledger *replay.Ledger // hides the standby's own: it may be of an older generation

	dumped  time.Time                         // when the image was taken, by this host's clock
	patches map[uint32]checkpoint.SocketPatch // of the image, before it is restored
	engine  *replay.Engine
	closing []tcpwrap.Cut          // of connections that the server had closed, to be revived
	carries map[stream.ConnID]bool // connections that the image has or the engine re-creates
	dialled []uint16               // ports of connections that the server dials again
	moved   []tcpwrap.Translated   // connections of the image whose port the peer knows as another
	newborn []stream.FourTuple     // those that are re-created
	planned time.Time              // when their clocks were set
	gone    []replay.Condemned
	drv     *driver
	rules   *tcpwrap.Rules
	tenure
}

// tenure is what attempts at one takeover share.
type tenure struct {
	first stream.Position  // of this epoch's records
	upTo  stream.StreamSeq // newest message of the log that is replayed
	end   func(error)      // ends the takeover
}

// recoverFrom tries the generations in turn: one whose image cannot be restored
// is not the end while the one before it is there, with its longer log.
func (s *standby) recoverFrom(ctx context.Context, c *clock, w *stream.Writer, candidates []local, end func(error)) (*primary, error) {
	if err := s.readUpTo(ctx, w.Fence().Seq); err != nil {
		return nil, err
	}
	ledger, t := s.ledger, tenure{w.Next(), w.Fence().Seq, end}
	var errs []error
	for i := 0; ; i++ {
		if i == len(candidates) {
			loc, err := s.lastResort(ctx, candidates)
			if err != nil {
				errs = append(errs, err)
			}
			if loc.gen.ID == 0 {
				break
			}
			candidates = append(candidates, loc)
		}
		loc := candidates[i]
		if loc.gen.ID == 0 {
			continue
		}
		if len(errs) > 0 {
			s.log.Error("recovering from another generation", "generation", loc.gen.ID, "err", errs[len(errs)-1])
			var err error
			if t.upTo, err = logged(ctx, w, t.first); err != nil {
				return nil, errors.Join(append(errs, err)...)
			}
			if ledger, err = s.ledgerFrom(ctx, loc, t.upTo); err != nil {
				return nil, errors.Join(append(errs, err)...)
			}
			if err := s.renewCapsule(ctx); err != nil {
				return nil, errors.Join(append(errs, err)...)
			}
		}
		p, err := s.becomePrimary(ctx, c, w, loc, ledger, t)
		if err == nil {
			return p, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// lastResort brings the newest generation here, when those that are here have
// failed and it is none of them: they may be so old that the log does not lead on
// from them any more.
func (s *standby) lastResort(ctx context.Context, tried []local) (local, error) {
	s.mu.Lock()
	gen, at := s.ledger.Gen, s.ledger.GenAt
	s.mu.Unlock()
	for _, loc := range tried {
		if loc.gen.ID == gen.ID {
			return local{}, nil
		}
	}
	s.log.Warn("bringing the newest generation here: nothing else can be restored", "generation", gen.ID)
	return s.bring(ctx, gen, at, local{})
}

// logged is the newest message of the log when what clients have sent to a failed
// attempt at this takeover is stable.
func logged(ctx context.Context, w *stream.Writer, first stream.Position) (stream.StreamSeq, error) {
	ctx, cancel := context.WithTimeout(ctx, fenceTime)
	defer cancel()
	if err := w.Drain(ctx); err != nil {
		return 0, fmt.Errorf("wait for what clients have sent meanwhile: %w", err)
	}
	if last := w.Stable(); last >= first {
		if seq, ok := w.SeqOf(last); ok {
			return seq, nil
		}
		return 0, fmt.Errorf("no message of the log holds position %d", last)
	}
	return w.Fence().Seq, nil
}

// ledgerFrom reads the log again from an older generation on: the ledger that
// follows the log has forgotten what only that generation needs.
func (s *standby) ledgerFrom(ctx context.Context, loc local, fence stream.StreamSeq) (*replay.Ledger, error) {
	l := replay.NewLedger()
	err := s.lg.ReadTo(ctx, loc.gen.FromSeq, fence, func(e stream.Entry) error {
		l.Apply(time.Now(), e)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the log from generation %d on: %w", loc.gen.ID, err)
	}
	l.Introduce(loc.gen, loc.tuples())
	s.mu.Lock()
	defer s.mu.Unlock()
	l.SeenAsIn(s.ledger)
	return l, nil
}

// renewCapsule ends a capsule in which a restore has failed, with whatever is
// left in it.
func (s *standby) renewCapsule(ctx context.Context) error {
	s.closeRecreator()
	if err := s.capsule.Close(); err != nil {
		return fmt.Errorf("end the capsule: %w", err)
	}
	if _, err := s.openCapsule(ctx); err != nil {
		return err
	}
	s.openRecreator()
	s.translated.remove() // none of them is in the new one
	var err error
	s.translated, err = newTranslations(s.cfg, s.log)
	return err
}

func (s *standby) becomePrimary(ctx context.Context, c *clock, w *stream.Writer, loc local, ledger *replay.Ledger, t tenure) (*primary, error) {
	r := &recovery{standby: s, clock: c, w: w, loc: loc, svc: loc.svc, ledger: ledger, tenure: t}
	if err := r.plan(); err != nil {
		return nil, err
	}
	if err := r.takeAddress(ctx); err != nil {
		return nil, err
	}
	restored, err := r.restore(ctx)
	if err != nil {
		_ = r.drv.close()
		return nil, err
	}
	if err := r.rollForward(ctx, restored.PID); err != nil {
		_ = r.drv.close()
		return nil, err
	}
	p, err := r.goLive(restored)
	if err != nil {
		_ = r.drv.close()
	}
	return p, err
}

// readUpTo waits until the ledger knows all that was logged before the fence.
func (s *standby) readUpTo(ctx context.Context, fence stream.StreamSeq) error {
	ctx, cancel := context.WithTimeout(ctx, fenceTime)
	defer cancel()
	for {
		s.mu.Lock()
		there, newest := s.ledger.LastSeq >= fence, s.ledger.Fence
		s.mu.Unlock()
		if newest.Seq > fence { // this host was stopped, perhaps: to go on would take the address away from who has it
			return fmt.Errorf("%w: %s was faster (epoch %d)", stream.ErrFenced, newest.Node, newest.Epoch)
		}
		if there {
			return nil
		}
		select {
		case <-s.change:
		case <-time.After(detectEvery):
		case <-ctx.Done():
			return fmt.Errorf("read the log up to the fence: %w", ctx.Err())
		}
	}
}

// plan finds out where each connection of the image stands now and what its
// timestamp clock has to go on from, and makes the engine.
func (r *recovery) plan() error {
	m := r.loc.manifest
	sth, err := parseSouth(m.South)
	if err != nil {
		return err
	}
	known := map[uint32]*checkpoint.ConnCut{}
	for i := range m.Conns {
		known[m.Conns[i].Inode] = &m.Conns[i]
	}
	now := time.Now()
	dumped := r.loc.at.Add(-time.Duration(sth.AgeMS) * time.Millisecond)
	r.dumped = dumped
	r.patches = map[uint32]checkpoint.SocketPatch{}
	var survivors []replay.Survivor
	r.mu.Lock()
	for _, k := range r.loc.socks {
		c := known[k.Inode]
		if c == nil || !carried(r.svc, k) {
			continue
		}
		id := c.Conn
		var patch checkpoint.SocketPatch
		if t, yes := sth.Translated[id]; yes {
			r.movePort(k, t)
			k = patchTranslated(k, t, &patch)
		}
		sv := replay.Survivor{Cut: cutOf(r.svc, k)}
		sv.Cut.Conn = id
		if c.SndUp != nil {
			sv.Cut.ServerUp, sv.Cut.Urgent = *c.SndUp, true
		}
		ts := k.Timestamp + uint32(now.Sub(dumped).Milliseconds())
		ln := r.ledger.Line(id)
		if ln != nil {
			sv.Ended, sv.Digests, sv.Logged = ln.Ended, ln.Digests, ln.Logged
			sv.Expired = ln.Ended && ln.Reason == stream.EndExpired
		}
		if slices.Contains(sth.Expired, id) { // the log may have lost the notice
			sv.Ended, sv.Expired = true, true
		}
		if ln != nil && ln.Known {
			sv.State, sv.Known = ln.State, true
			if ln.State.ServerTS != 0 {
				seen := ln.State.ServerTS + uint32(now.Sub(ln.StateAt).Milliseconds())
				ts = uint32(seqnum.Max(seqnum.Value(ts), seqnum.Value(seen)))
			}
		}
		if sv.Cut.HasTS {
			// The lowest bit is none of the clock's: it would make it count
			// microseconds from now on (Linux 6.7, TCP_TIMESTAMP in repair mode).
			ts = (ts+clockMargin)&^1 | k.Timestamp&1
			sv.TS = ts
			patch.Timestamp = &ts
		}
		r.patches[k.Inode] = patch
		survivors = append(survivors, sv)
	}
	for _, c := range sth.Closing {
		ln := r.ledger.Line(c.Conn)
		if ln != nil && ln.Ended {
			continue
		}
		ts := c.ServerTS + uint32(now.Sub(dumped).Milliseconds())
		if ln != nil && ln.Known && ln.State.ServerTS != 0 {
			seen := ln.State.ServerTS + uint32(now.Sub(ln.StateAt).Milliseconds())
			ts = uint32(seqnum.Max(seqnum.Value(ts), seqnum.Value(seen)))
		}
		c.ServerTS = (ts + clockMargin) &^ 1
		sv := replay.Survivor{Cut: c, TS: c.ServerTS, Closing: true}
		if ln != nil {
			sv.Logged = ln.Logged
		}
		if ln != nil && ln.Known {
			sv.State, sv.Known = ln.State, true
		}
		survivors = append(survivors, sv)
		r.closing = append(r.closing, c)
	}
	var newborns []replay.Newborn
	r.planned = now
	if r.way != wayNone {
		waited := map[stream.ConnID]bool{}
		for _, id := range sth.Unaccepted {
			waited[id] = true
		}
		newborns = r.ledger.Newborns(r.loc.gen.Cut, waited, func(ts uint32, seen time.Time) uint32 {
			return ts + uint32(now.Sub(seen).Milliseconds()) + clockMargin
		})
	}
	redials := r.redials(sth, now)
	r.mu.Unlock()
	r.engine = replay.NewEngine(survivors)
	r.carries = r.engine.AddNewborns(newborns)
	maps.Copy(r.carries, r.engine.AddRedials(redials))
	for _, n := range newborns {
		r.newborn = append(r.newborn, n.Open.Tuple)
	}
	for _, c := range m.Conns {
		r.carries[c.Conn] = true
	}
	for _, c := range r.closing {
		r.carries[c.Conn] = true
	}
	return nil
}

// takeAddress makes clients' packets come here, where the engine answers them: the
// address moves before the restore, so that clients' retransmission timers do not
// back off meanwhile.
func (r *recovery) takeAddress(ctx context.Context) error {
	if err := prepareVIPs(r.capsule, r.svc); err != nil {
		return err
	}
	r.rules = capsuleRules(r.cfg, r.svc, r.capsule)
	q, number, err := openQueue(r.rules.NetNS, r.rules.Name)
	if err != nil {
		return err
	}
	r.rules.Queue = number
	r.drv = newDriver(q, r.translated, r.log)
	r.drv.engine, r.drv.bear, r.drv.writer, r.drv.failed = r.engine, r.bear, r.w, r.end
	r.w.OnStable(r.drv.stable)
	if err := r.reservePorts(); err != nil {
		_ = q.Close()
		return err
	}
	for _, t := range r.moved {
		r.drv.dp.Put(t)
	}
	r.drv.dp.Expect(r.newborn) // their clients' packets may wait here before TCP has them
	if err := r.rules.InstallAlone(); err != nil {
		_ = q.Close()
		return fmt.Errorf("install packet rules in the capsule: %w", err)
	}
	r.drv.start()
	if err := r.capsule.TakeVIP(); err != nil {
		_ = r.drv.close()
		return fmt.Errorf("take the address %s: %w", r.svc.vips(), err)
	}
	if err := r.capsule.Announce(ctx); err != nil {
		r.log.Warn("announce the address", "err", err)
	}
	r.drv.with(func() {
		r.engine.StandIn(r.w.Next(), r.silence())
		r.engine.Greet()
	})
	r.clock.step("vip-taken", &r.clock.t.VIPMS, "vip", r.svc.vips())
	return nil
}

// silence is for how long nobody has answered clients. A standby that has never
// heard of the primary cannot tell.
func (r *recovery) silence() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.judge.HeardAt().IsZero() && !r.restores {
		return unknownSilence
	}
	return time.Since(r.clock.start)
}

func (r *recovery) restore(ctx context.Context) (checkpoint.Restored, error) {
	if err := checkpoint.PatchSockets(r.loc.dir, r.loc.socks, r.patches); err != nil {
		return checkpoint.Restored{}, fmt.Errorf("set the clocks of generation %d: %w", r.loc.gen.ID, err)
	}
	gone := leftBehind(r.svc, r.loc.socks)
	giveBack, err := r.lend(gone)
	if err != nil {
		return checkpoint.Restored{}, fmt.Errorf("restore generation %d: %w", r.loc.gen.ID, err)
	}
	res, err := r.criu.Restore(ctx, checkpoint.RestoreRequest{
		Dir: r.loc.dir, InitPID: r.capsule.InitPID(),
		BeforeResume: func(int) error { r.setOptions(checkpoint.BeforeResume); return r.reset(gone) },
	})
	r.clock.t.Resets += len(gone)
	if err = errors.Join(err, giveBack()); err != nil {
		return res, fmt.Errorf("restore generation %d: %w", r.loc.gen.ID, err)
	}
	r.clock.step("restored", &r.clock.t.RestoreMS, "pid", res.PID, "generation", r.loc.gen.ID)
	return res, nil
}

// setOptions gives the restored sockets what CRIU has lost. None of it is worth
// failing for: no octet depends on it.
func (r *recovery) setOptions(when checkpoint.Moment) {
	lost, err := checkpoint.ApplySocketOptions(r.loc.dir, r.capsule.InitPID(), r.loc.socks, r.loc.manifest.SocketOptions, when)
	if err != nil {
		r.log.Warn("socket options are the system's defaults from here on", "err", err)
	}
	for _, why := range lost {
		r.log.Warn("a socket option could not be restored on this host", "option", why)
	}
}

// rollForward feeds the log from the generation on and waits until every
// connection has come as far as its client.
func (r *recovery) rollForward(ctx context.Context, pid int) error {
	r.resetStrangers()
	r.revive()
	r.drv.with(func() {
		r.drv.busy = func() bool { return !idle(pid) }
		r.engine.Start(time.Now())
	})
	err := r.lg.ReadTo(ctx, r.loc.gen.FromSeq, r.upTo, func(e stream.Entry) error {
		if e.Rec == nil || e.Pos < r.loc.gen.From {
			return nil
		}
		full := false
		r.drv.with(func() {
			r.engine.Feed(time.Now(), e.Rec)
			full = r.engine.Full()
		})
		if full {
			return r.progress(ctx, func() bool { return !r.engine.Full() })
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("replay the log from %d: %w", r.loc.gen.FromSeq, err)
	}
	r.drv.with(func() { r.engine.Fed(time.Now()) })
	stuck := r.progress(ctx, r.engine.Done)
	if stuck != nil && !errors.Is(stuck, errNoProgress) {
		return stuck
	}
	r.drv.with(func() {
		r.engine.GiveUpDials()
		gone := r.engine.Condemned()
		if stuck != nil {
			gone = append(gone, r.engine.Condemn()...)
		}
		r.giveUp(gone)
	})
	st := r.engineStats()
	r.clock.step("replayed", &r.clock.t.ReplayMS,
		"injected", st.Injected, "injected_bytes", st.InjectedBytes, "swallowed_bytes", st.SwallowedBytes, "resent", st.Resent, "kept", st.Kept, "taken_bytes", st.TakenBytes)
	return nil
}

// giveUp counts and tells connections that the engine has reset.
func (r *recovery) giveUp(gone []replay.Condemned) {
	r.gone = append(r.gone, gone...)
	for _, c := range gone {
		r.clock.t.Resets++
		r.log.Error("connection reset: its recovery cannot be exact", "conn", c.Tuple, "why", c.Why)
	}
}

func (r *recovery) engineStats() (st replay.Stats) {
	r.drv.with(func() { st = r.engine.Stats() })
	return st
}

var errNoProgress = errors.New("the replay makes no progress")

// progress waits until done, as long as the replay moves.
func (r *recovery) progress(ctx context.Context, done func() bool) error {
	t := time.NewTicker(time.Millisecond)
	defer t.Stop()
	var last replay.Stats
	moved := time.Now()
	for {
		var ok bool
		var st replay.Stats
		r.drv.with(func() { ok, st = done(), r.engine.Stats() })
		if ok {
			return nil
		}
		st.Resent = 0 // repeating oneself is no progress
		if st != last {
			last, moved = st, time.Now()
		}
		if time.Since(moved) > quietTime {
			return errNoProgress
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// goLive hands the connections to a machine of the new epoch and lets them
// speak.
func (r *recovery) goLive(res checkpoint.Restored) (*primary, error) {
	watch, err := tcpwrap.WatchProc(res.PID)
	if err != nil {
		return nil, fmt.Errorf("watch the restored server: %w", err)
	}
	sth, err := parseSouth(r.loc.manifest.South)
	if err != nil {
		return nil, err
	}
	began := taken{gen: r.loc.gen, manifest: r.loc.manifest, at: r.loc.at}
	p := newPrimary(&primary{
		log: r.log, out: r.out, node: r.node, svc: r.svc,
		where: inCapsule(res.PID, r.capsule),
		lg:    r.lg, w: r.w, store: r.store, url: r.url, drv: r.drv, rules: r.rules, criu: r.criu,
		exited: watch.Exited(), life: watch.Life,
		gen: began, kept: []taken{began},
		takes: 1, server: r.srv, lastID: r.ledger.Gen.ID, first: r.first,
		translated: r.translated,
	})
	if p.dir, err = imageDir(r.cfg.Common, r.cfg.Name+"-primary"); err != nil {
		return nil, err
	}
	p.trusts = r.ledger.Gen
	r.drv.failed = p.end
	r.drv.dying, r.drv.tree = watch.Dying, newTree(res.PID)
	next := sth.NextConn
	r.mu.Lock()
	r.ledger.Lines(func(l *replay.Line) { next = max(next, l.Conn+1) })
	orphans := r.ledger.Orphans(func(id stream.ConnID) bool { return r.carries[id] })
	late := r.ledger.TimeWait(time.Now())
	r.mu.Unlock()

	now := time.Now()
	var live int
	r.drv.with(func() {
		cuts, waiting := r.engine.GoLive()
		r.giveUp(r.engine.Condemned())
		live = len(cuts) + r.engine.Remaining()
		m := tcpwrap.NewMachine(r.engine.Next(), next, tcpwrap.DefaultLimits())
		m.StableSoFar(r.w.Stable())
		r.engine.Succeed(m)
		r.drv.machine = m
		m.Append(stream.Hello{Config: r.svc.hello()})
		m.Adopt(cuts)
		m.Linger(late)
		for i := range waiting {
			m.Packet(now, waiting[i].ID, &waiting[i].Segment, false)
		}
		for _, c := range r.gone { // or the next takeover would try them again
			m.Append(stream.ConnEnd{Conn: c.Conn, Reason: stream.EndReset})
		}
		for _, o := range orphans {
			m.Append(stream.ConnEnd{Conn: o.Conn, Reason: stream.EndReset})
			for _, at := range o.At {
				m.Ready.Send(tcpwrap.Outgoing{Tuple: o.Tuple, Seq: at, Flags: tcpwrap.RST})
			}
		}
	})
	r.drv.dp.Expect(nil)
	r.clock.t.Connections, r.clock.t.Resets = live, r.clock.t.Resets+len(orphans)
	r.clock.t.TotalMS = float64(time.Since(r.clock.start).Microseconds()) / 1000
	r.log.Info("live", "event", "live", "ms", r.clock.t.TotalMS, "connections", live, "resets", r.clock.t.Resets, "epoch", r.w.Epoch())
	for _, o := range orphans {
		r.log.Warn("connection reset: it is younger than the newest generation, and cannot be re-created", "conn", o.Tuple)
	}
	r.admitStrangers()
	r.setOptions(checkpoint.AfterLive)
	p.divergences = r.engineStats().Divergences
	p.takeover = &r.clock.t
	return p, nil
}
