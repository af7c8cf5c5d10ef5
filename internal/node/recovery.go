package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
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
		// Repeating oneself is no progress, on neither side, nor is answering clients.
		st.Resent, st.Swallowed, st.SwallowedBytes, st.Answered, st.Refused = 0, 0, 0, 0, 0
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
