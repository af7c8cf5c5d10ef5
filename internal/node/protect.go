package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/checkpoint/check"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	openTime = 10 * time.Second
	// ownerSilence is how long the owner of the newest fence must be silent
	// before a node that is told to protect the same service believes it gone.
	ownerSilence = time.Second
)

// Protect runs the primary of a server that runs already, until ctx ends or it
// is fenced.
func Protect(ctx context.Context, cfg config.Protect, out io.Writer, log *slog.Logger) error {
	raiseLimits(log)
	node, err := nodeID(cfg.StateDir)
	if err != nil {
		return exitcode.Wrap(exitcode.Failed, err)
	}
	ctl, err := control.Listen(cfg.RunDir, cfg.Name, log)
	if err != nil {
		return err
	}
	defer ctl.Close()
	criu, err := checkpoint.Locate(ctx, "")
	if err != nil {
		return exitcode.Wrap(exitcode.Unsuitable, err)
	}
	if err := criu.Warm(ctx); err != nil {
		log.Warn("prepare CRIU", "err", err)
	}
	svc, err := examine(cfg)
	if err != nil {
		return err
	}
	if err := checkOutgoing(ctx, cfg); err != nil {
		return err
	}
	watch, err := tcpwrap.WatchProc(cfg.PID)
	if err != nil {
		return exitcode.Wrap(exitcode.Unsuitable, fmt.Errorf("watch pid %d: %w", cfg.PID, err))
	}
	defer watch.Close()

	octx, cancel := context.WithTimeout(ctx, openTime)
	lg, srv, err := openLog(octx, cfg)
	cancel()
	if err != nil {
		return exitcode.Wrap(exitcode.Failed, fmt.Errorf("open the log: %w", err))
	}
	defer func() {
		_ = lg.Close()
		if srv != nil {
			srv.Shutdown()
		}
	}()
	p := newPrimary(&primary{
		log: log, out: out, node: node, svc: svc,
		where: place{pid: cfg.PID, dev: cfg.Dev, leave: func() error { return removeVIPs(cfg) }},
		lg:    lg, store: lg.Store(stream.StoreOptions{}), url: lg.URL(), server: srv, criu: criu,
		rules: &tcpwrap.Rules{
			Name: instance(cfg.Name, cfg.RunDir), VIPs: svc.addrs(), Ports: svc.Ports, Clients: svc.Clients, Peers: svc.Outgoing, Dev: svc.Dev, Mark: packetMark,
		},
		exited: watch.Exited(), life: watch.Life, fencedServer: cfg.Fenced,
	})
	if p.dir, err = imageDir(cfg.Common, cfg.Name+"-primary"); err != nil {
		return err
	}
	defer os.RemoveAll(p.dir)
	prev, err := p.mayClaim(ctx)
	if err != nil {
		return err
	}
	// Only now: an address in use means something else to one who was replaced.
	if err := checkVIPs(ctx, cfg); err != nil {
		return err
	}
	if err := p.claim(ctx, watch, prev); err != nil {
		return err
	}
	if cfg.OnCrash != config.OnCrashLocal {
		defer answer(ctx, ctl, p, log)()
		return p.run(ctx)
	}
	s, end, err := newSuccessor(ctx, cfg, p, out, log)
	if err != nil {
		return errors.Join(err, p.part())
	}
	defer end()
	p.local = true
	defer answer(ctx, ctl, s, log)()
	return s.succeed(ctx, p.run(ctx))
}

// answer serves a control socket until ctx ends or end is called, which waits
// for answers under way.
func answer(ctx context.Context, ctl *control.Server, h control.Handler, log *slog.Logger) (end func()) {
	ctx, stop := context.WithCancel(ctx)
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := ctl.Serve(ctx, h); err != nil && ctx.Err() == nil {
			log.Error("control socket", "err", err)
		}
	}()
	return func() {
		stop()
		<-served
	}
}

// examine finds out whether this process can be protected.
func examine(cfg config.Protect) (service, error) {
	svc := service{
		Name: cfg.Name, VIPs: cfg.VIPs, Ports: cfg.Ports, Clients: cfg.Clients, Outgoing: cfg.Outgoing,
		Dev: cfg.Dev, Interval: cfg.Interval, Schedule: cfg.Schedule, MaxReplay: cfg.MaxReplay, IdleExpiry: cfg.IdleExpiry,
	}
	target, err := check.InspectTarget(cfg.PID)
	if err != nil {
		return svc, exitcode.Wrap(exitcode.Unsuitable, err)
	}
	if err := target.Err(); err != nil {
		return svc, exitcode.Wrap(exitcode.Unsuitable, err)
	}
	if !sameNetNS(cfg.PID) {
		return svc, exitcode.Errorf(exitcode.Unsuitable, "pid %d is in another network namespace: run ftckpt protect in there (nsenter -t %d -n)", cfg.PID, cfg.PID)
	}
	for _, v := range cfg.VIPs {
		heard := portsAt(target.Listeners, v.Addr())
		if len(heard) == 0 {
			return svc, exitcode.Errorf(exitcode.Unsuitable, "pid %d does not listen on %s: bind the server to that address (or to all), or give the right --vip", cfg.PID, v.Addr())
		}
		for _, p := range cfg.Ports {
			if !slices.Contains(heard, p) {
				return svc, exitcode.Errorf(exitcode.Unsuitable, "pid %d does not listen on %s: it listens on ports %v of %s", cfg.PID, netip.AddrPortFrom(v.Addr(), p), heard, v.Addr())
			}
		}
		if len(cfg.Ports) > 0 {
			continue
		}
		if svc.Ports == nil {
			svc.Ports = heard
		}
		if !slices.Equal(svc.Ports, heard) {
			return svc, exitcode.Errorf(exitcode.Unsuitable, "pid %d listens on ports %v of %s but on ports %v of %s: give those that it has on every address as --port", cfg.PID, svc.Ports, cfg.VIPs[0].Addr(), heard, v.Addr())
		}
	}
	return svc, nil
}

// sameNetNS reports whether a process is in this one's network namespace, where
// the packet rules are going to be.
func sameNetNS(pid int) bool {
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return true // no namespaces to be different in
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err != nil || ours == theirs
}

// portsAt are the ports on which listeners hear what is sent to addr. One on
// [::] hears IPv4 as well unless it was told not to, which /proc does not say;
// one on 0.0.0.0 never hears IPv6.
func portsAt(listeners []check.Listener, addr netip.Addr) []uint16 {
	var ports []uint16
	for _, l := range listeners {
		if a := l.Addr.Addr(); a.IsUnspecified() && (a.Is6() || addr.Is4()) || a.Unmap() == addr {
			ports = append(ports, l.Addr.Port())
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// logConfig says where a service's log is; embed is where to listen when it is
// in this process.
func logConfig(name, join, url string) (c stream.Config, embed string, err error) {
	c = stream.Config{Service: name, Join: join}
	if join != "" {
		if _, err := stream.ParseJoin(join); err != nil {
			return c, "", exitcode.Wrap(exitcode.Config, err)
		}
	}
	if url == "" {
		return c, "", nil
	}
	u, err := config.ParseLogURL(url)
	if err != nil {
		return c, "", err
	}
	if u.Embedded() {
		return c, u.Addr(), nil
	}
	c.URL, c.User, c.Password, c.Token = u.String(), u.User, u.Password, u.Token
	return c, "", nil
}

// openLog opens the log; srv is its server when that is in this process, which
// only --on-crash local may want.
func openLog(ctx context.Context, cfg config.Protect) (lg *stream.Log, srv *stream.Server, err error) {
	c, embed, err := logConfig(cfg.Name, cfg.Join, cfg.Log)
	if err != nil {
		return nil, nil, err
	}
	if embed != "" {
		if srv, err = embedLog(cfg.Common, embed); err != nil {
			return nil, nil, err
		}
		c.Server = srv
	}
	if lg, err = stream.Open(ctx, c); err != nil && srv != nil {
		srv.Shutdown()
	}
	return lg, srv, err
}

// claim becomes the primary after the one of the fence at prev: fence first,
// then packet rules, then the first record.
func (p *primary) claim(ctx context.Context, watch *tcpwrap.ProcWatch, prev stream.StreamSeq) (err error) {
	if p.w, err = p.lg.AcquireIf(ctx, p.node, prev); err != nil {
		if errors.Is(err, stream.ErrFenced) {
			return exitcode.Wrap(exitcode.Fenced, fmt.Errorf("become the primary of %s: %w", p.svc.Name, err))
		}
		return fmt.Errorf("become the primary of %s: %w", p.svc.Name, err)
	}
	q, number, err := openQueue(p.where.netns, p.rules.Name)
	if err != nil {
		_ = p.w.Close()
		return exitcode.Wrap(exitcode.Unsuitable, err)
	}
	p.rules.Queue = number
	p.drv = newDriver(q, p.translated, p.log)
	p.translated.putInto(p.drv.dp)
	p.drv.dying, p.drv.tree, p.drv.failed = watch.Dying, newTree(p.where.pid), p.end
	p.w.OnStable(p.drv.stable)
	m := tcpwrap.NewMachine(p.w.Next(), p.nextConn, tcpwrap.DefaultLimits())
	svc := p.svc
	svc.Anew = true
	p.drv.with(func() {
		p.drv.machine, p.drv.writer = m, p.w
		m.Append(stream.Hello{Config: svc.hello()})
	})
	p.drv.start()
	err = p.rules.Install()
	if err == nil {
		err = p.rules.RemoveOthers()
	}
	if err != nil {
		_ = p.drv.close()
		_ = p.w.Close()
		return exitcode.Wrap(exitcode.Unsuitable, fmt.Errorf("install packet rules: %w", err))
	}
	return nil
}

// mayClaim reads who was the primary. A node that lives keeps its service: a
// restarted agent of a server that was taken over must not win it back.
func (p *primary) mayClaim(ctx context.Context) (prev stream.StreamSeq, err error) {
	f, err := p.lg.LastFence(ctx)
	if errors.Is(err, stream.ErrMissing) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the newest fence: %w", err)
	}
	if f.Node != p.node {
		if err := p.makeWay(f); err != nil {
			return 0, err
		}
		there, err := alive(ctx, p.lg, f.Node)
		if err != nil {
			return 0, err
		}
		if there {
			return 0, exitcode.Errorf(exitcode.Fenced, "%s is served by node %s (epoch %d): this server is not the service any more", p.svc.Name, f.Node, f.Epoch)
		}
	}
	l, err := readLegacy(ctx, p.lg, p.store)
	p.lastID, p.nextConn, p.trusts = l.gen.ID, l.nextConn, l.gen
	return f.Seq, err
}

// makeWay takes the service off this host if its agent was killed as the
// primary and owner has taken over since, whether that one still lives or not:
// the rules tell, which the agent could not remove. Server and connections here
// are of the past, and the address is another host's.
func (p *primary) makeWay(owner stream.Fence) error {
	left, err := tcpwrap.Installed(p.where.netns, p.rules.Name)
	if err != nil {
		return fmt.Errorf("look for packet rules of an earlier agent: %w", err)
	}
	if len(left) == 0 {
		return nil
	}
	return p.leaveHost(exitcode.Errorf(exitcode.Fenced, "%s was taken over by node %s (epoch %d) while nothing watched this server: it is not the service any more, and %s was removed from this host",
		p.svc.Name, owner.Node, owner.Epoch, p.svc.vips()))
}

// legacy is what earlier epochs leave in the log.
type legacy struct {
	gen      stream.Generation // newest; ID 0: none
	south    south             // of its manifest
	nextConn stream.ConnID     // identities below it are used up
}

// readLegacy reads the log that there is.
func readLegacy(ctx context.Context, lg *stream.Log, store *stream.Store) (l legacy, err error) {
	st, err := lg.Status(ctx)
	if err != nil {
		return l, fmt.Errorf("ask for the log's extent: %w", err)
	}
	err = lg.ReadTo(ctx, st.First, st.Last, func(e stream.Entry) error {
		switch r := e.Rec.(type) {
		case stream.Generation:
			l.gen = r
		case stream.ConnOpen:
			l.nextConn = max(l.nextConn, r.Conn+1)
		case stream.ConnState:
			l.nextConn = max(l.nextConn, r.Conn+1)
		}
		return nil
	})
	if err != nil {
		return l, fmt.Errorf("read the log of the epoch before: %w", err)
	}
	if l.gen.ID == 0 {
		return l, nil
	}
	b, err := store.Get(ctx, l.gen.Manifest)
	if err != nil {
		return l, fmt.Errorf("read the manifest of generation %d: %w", l.gen.ID, err)
	}
	m, err := checkpoint.DecodeManifest(b)
	if err != nil {
		return l, err
	}
	l.south, err = parseSouth(m.South)
	l.nextConn = max(l.nextConn, l.south.NextConn) // idle connections are in no record
	return l, err
}

// alive listens whether the primary of that name is there.
func alive(ctx context.Context, lg *stream.Log, node string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, ownerSilence)
	defer cancel()
	heard := make(chan struct{}, 1)
	err := lg.WatchBeats(ctx, func(b stream.Beat) {
		if b.Role == roles.Primary && b.Node == node {
			notify(heard)
		}
	})
	if err != nil {
		return false, fmt.Errorf("listen for the primary: %w", err)
	}
	select {
	case <-heard:
		return true, nil
	case <-ctx.Done():
		return false, nil
	}
}
