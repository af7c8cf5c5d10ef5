package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/replay/capsule"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// resident is a service that lives in a capsule of this host although its agent
// is gone: this node took it over and was then killed or stopped.
type resident struct{ pid int }

// openCapsule makes a capsule, or finds the one an earlier agent left with the
// service still inside: that one is never ended by a mere restart.
func (s *standby) openCapsule(ctx context.Context) (*resident, error) {
	c, err := capsule.Adopt(s.cfg.RunDir, s.cfg.Name)
	switch {
	case err == nil:
		empty, err := c.Empty()
		if err != nil {
			return nil, fmt.Errorf("look into the capsule an earlier agent left: %w", err)
		}
		if !empty {
			pid, err := childOf(c.InitPID())
			if err != nil && !errors.Is(err, errNoChild) { // it has none before a restore is done
				return nil, fmt.Errorf("find the service in the capsule an earlier agent left: %w", err)
			}
			s.capsule = c
			return &resident{pid}, nil
		}
		if err := c.Close(); err != nil {
			return nil, fmt.Errorf("end the capsule an earlier agent left: %w", err)
		}
	case !errors.Is(err, capsule.ErrNoCapsule):
		return nil, fmt.Errorf("look for a capsule an earlier agent left: %w", err)
	}
	if err := capsule.CleanupStale(s.cfg.RunDir, s.cfg.Name); err != nil {
		return nil, fmt.Errorf("clean up what an earlier standby left: %w", err)
	}
	s.capsule, err = capsule.Start(ctx, capsule.Options{Name: s.cfg.Name, RunDir: s.cfg.RunDir, Dev: s.cfg.Dev, Log: s.log})
	if err != nil {
		return nil, exitcode.Wrap(exitcode.Unsuitable, fmt.Errorf("make a capsule: %w", err))
	}
	return nil, nil
}

var errNoChild = errors.New("init has no child")

// childOf finds the one child of a capsule's init: the root of the service.
func childOf(init int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", init, init))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) == 0 {
		return 0, errNoChild
	}
	return strconv.Atoi(f[0])
}

// resume protects the resident service as its primary again, if the log says
// that this node still is the one.
func (s *standby) resume(ctx context.Context, r *resident) error {
	if r.pid == 0 {
		s.capsule.Release()
		return fmt.Errorf("find the service in the capsule an earlier agent left: %w", errNoChild)
	}
	s.log.Info("the service lives in this host's capsule: protecting it again", "pid", r.pid)
	svc, owner, err := s.inherited(ctx)
	if err != nil {
		s.release()
		return err
	}
	if owner.Node != s.node {
		_ = s.capsule.Close() // its packets have had no way out since its agent ended
		return exitcode.Errorf(exitcode.Fenced, "%s is served by node %s (epoch %d): the server left in this host's capsule was ended", svc.Name, owner.Node, owner.Epoch)
	}
	watch, err := tcpwrap.WatchProc(r.pid)
	if err != nil {
		return fmt.Errorf("watch pid %d: %w", r.pid, err)
	}
	defer watch.Close()
	p := newPrimary(&primary{
		log: s.log, out: s.out, node: s.node, svc: svc, where: inCapsule(r.pid, s.capsule),
		lg: s.lg, store: s.store, url: s.url, criu: s.criu, server: s.srv,
		rules:  capsuleRules(s.cfg, svc, s.capsule),
		exited: watch.Exited(), life: watch.Life, translated: s.translated,
	})
	if p.dir, err = imageDir(s.cfg.Common, s.cfg.Name+"-primary"); err != nil {
		return err
	}
	prev, err := p.mayClaim(ctx)
	if err == nil {
		err = p.claim(ctx, watch, prev)
	}
	if err != nil {
		s.release()
		return err
	}
	return s.reign(ctx, p)
}

// inherited reads the service's description and its primary from the log.
func (s *standby) inherited(ctx context.Context) (svc service, owner stream.Fence, err error) {
	if owner, err = s.lg.LastFence(ctx); err != nil {
		return svc, owner, fmt.Errorf("read the newest fence: %w", err)
	}
	l, err := readLegacy(ctx, s.lg, s.store)
	if err != nil {
		return svc, owner, err
	}
	svc, err = l.south.service()
	return svc, owner, err
}

// release lets the capsule outlive this agent, with the server inside.
func (s *standby) release() {
	s.capsule.Release()
	s.leaves = true
}

func inCapsule(pid int, c *capsule.Capsule) place {
	return place{pid: pid, initPID: c.InitPID(), netns: c.NetNS(), dev: capsule.DefaultVIPDev, leave: c.DropVIP}
}

// prepareVIPs gives a capsule the service's addresses, without anybody seeing
// them yet, instead of those that an earlier protection had.
func prepareVIPs(c *capsule.Capsule, svc service) error {
	have := c.VIPs()
	if slices.Equal(have, svc.VIPs) {
		return nil
	}
	if len(have) > 0 {
		if err := c.DropVIP(); err != nil {
			return fmt.Errorf("give up the service's earlier addresses: %w", err)
		}
	}
	if err := c.PrepareVIPs(svc.VIPs); err != nil {
		return fmt.Errorf("prepare the service's addresses %s in the capsule: %w", svc.vips(), err)
	}
	return nil
}

// capsuleRules are the rules of a service in a capsule, where the only device
// besides lo is its own.
func capsuleRules(cfg config.Standby, svc service, c *capsule.Capsule) *tcpwrap.Rules {
	return &tcpwrap.Rules{
		Name: instance(cfg.Name, cfg.RunDir), VIPs: svc.addrs(), Ports: svc.Ports, Clients: svc.Clients, Peers: svc.Outgoing,
		Mark: packetMark, NetNS: c.NetNS(),
	}
}

// wentLive reports whether the newest takeover came to its end: a primary that is
// live says Hello first, and takes generations later. A server of a takeover that
// was cut short has not heard all that the log says.
func (s *standby) wentLive(ctx context.Context) (yes bool, err error) {
	owner, err := s.lg.LastFence(ctx)
	if err != nil {
		return false, fmt.Errorf("read the newest fence: %w", err)
	}
	st, err := s.lg.Status(ctx)
	if err != nil {
		return false, fmt.Errorf("ask for the log's extent: %w", err)
	}
	err = s.lg.ReadTo(ctx, max(st.First, owner.Seq), st.Last, func(e stream.Entry) error {
		switch e.Rec.(type) {
		case stream.Hello, stream.Generation:
			yes = yes || e.Epoch == owner.Epoch
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("read the log of epoch %d: %w", owner.Epoch, err)
	}
	return yes || owner.Node != s.node, nil // resume says what becomes of one that was replaced
}
