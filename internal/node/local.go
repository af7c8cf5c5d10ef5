package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/replay"
)

const (
	// localTries is how many deaths within localSpan are answered by restoring the
	// server where it died: one that dies again and again of the same input would
	// do so for ever.
	localTries = 3
	localSpan  = time.Minute
)

// errServerDied is the end of a tenure whose server has died on a living host,
// where this host is to bring it back itself (--on-crash local).
var errServerDied = errors.New("the server process has died")

// successor is the standby that a primary has in its own process: it follows the
// log as any other does, and takes over only from a server that has died here.
type successor struct {
	*standby
	p      *primary
	deaths []time.Time
}

// newSuccessor prepares this host to restore its own service. end undoes it.
func newSuccessor(ctx context.Context, cfg config.Protect, p *primary, out io.Writer, log *slog.Logger) (*successor, func(), error) {
	s := &standby{
		cfg: config.Standby{Common: cfg.Common, Name: cfg.Name, Dev: cfg.Dev, Mode: config.ModeWarm, Detect: config.DefaultDetect, Recreate: config.RecreateAuto},
		log: log, out: out, ledger: replay.NewLedger(), node: p.node, criu: p.criu, restores: true,
		judge: roles.NewJudge(p.node, config.DefaultDetect, detectEvery),
		lg:    p.lg, store: p.store, url: p.url, srv: p.server,
		news: make(chan struct{}, 1), change: make(chan struct{}, 1),
	}
	var err error
	if s.images, err = imageDir(cfg.Common, cfg.Name+"-local"); err != nil {
		return nil, nil, err
	}
	left, err := s.openCapsule(ctx)
	if err == nil && left != nil {
		err = exitcode.Errorf(exitcode.Failed, "the service %s lives in this host's capsule (pid %d): run ftckpt standby to protect it again", cfg.Name, left.pid)
	}
	if err == nil {
		if s.translated, err = newTranslations(s.cfg, log); err != nil {
			_ = s.capsule.Close()
		}
	}
	if err != nil {
		_ = os.RemoveAll(s.images)
		return nil, nil, fmt.Errorf("prepare to restore the server on this host: %w", err)
	}
	s.openRecreator()
	ctx, cancel := context.WithCancel(ctx)
	go s.follow(ctx)
	go s.fetch(ctx)
	end := func() {
		cancel()
		s.closeRecreator()
		_ = s.capsule.Close()
		s.endTranslations()
		_ = os.RemoveAll(s.images)
	}
	return &successor{standby: s, p: p}, end, nil
}

// succeed restores the server, each time it dies, until a tenure ends in another
// way. err is how the one before has ended.
func (s *successor) succeed(ctx context.Context, err error) error {
	for errors.Is(err, errServerDied) {
		now := time.Now()
		if s.deaths = append(s.deaths, now); len(s.deaths) > localTries {
			s.deaths = s.deaths[1:]
			if now.Sub(s.deaths[0]) < localSpan {
				return exitcode.Errorf(exitcode.Failed, "the server has died %d times within %v; a standby may take over", localTries+1, localSpan)
			}
		}
		if err := s.renew(ctx); err != nil {
			return exitcode.Wrap(exitcode.Failed, fmt.Errorf("restore the server on this host: %w", err))
		}
		err = s.takeOver(ctx, errServerDied.Error(), now)
	}
	return err
}

// renew makes room for another recovery after the one that has been.
func (s *successor) renew(ctx context.Context) error {
	s.mu.Lock()
	was := s.primary
	s.primary = nil
	s.mu.Unlock()
	if was == nil {
		return nil // the capsule was never used
	}
	if err := s.renewCapsule(ctx); err != nil {
		return err
	}
	if err := s.fetchNewest(ctx); err != nil {
		s.log.Warn("cannot bring the newest generation here; going on with the one before", "err", err)
	}
	return nil
}

// Status implements control.Handler.
func (s *successor) Status() control.Status {
	s.mu.Lock()
	begun := s.primary != nil || s.taking
	s.mu.Unlock()
	if begun {
		return s.standby.Status()
	}
	return s.p.Status()
}

// Checkpoint implements control.Handler.
func (s *successor) Checkpoint(ctx context.Context) (control.CheckpointResult, error) {
	return s.serving().Checkpoint(ctx)
}

// Failover implements control.Handler.
func (s *successor) Failover(ctx context.Context, req control.FailoverRequest) (control.FailoverResult, error) {
	return s.serving().Failover(ctx, req)
}

func (s *successor) serving() *primary {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.primary != nil {
		return s.primary
	}
	return s.p
}
