package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
)

// fenceTime bounds one attempt to fence; a log that does not answer is no
// reason to give up, so attempts are repeated.
const fenceTime = 5 * time.Second

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
