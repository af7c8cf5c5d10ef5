package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/l2"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	openTime  = 10 * time.Second
	probeTime = 600 * time.Millisecond
	// ownerSilence is how long the owner of the newest fence must be silent
	// before a node that is told to protect the same service believes it gone.
	ownerSilence = time.Second
)

// Protect runs the primary of a server that runs already, until ctx ends or it
// is fenced.
func Protect(ctx context.Context, cfg config.Protect, out io.Writer, log *slog.Logger) error {
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
	svc, err := examine(ctx, cfg)
	if err != nil {
		return err
	}
	watch, err := tcpwrap.WatchProc(cfg.PID)
	if err != nil {
		return exitcode.Wrap(exitcode.Unsuitable, fmt.Errorf("watch pid %d: %w", cfg.PID, err))
	}
	defer watch.Close()

	octx, cancel := context.WithTimeout(ctx, openTime)
	lg, err := openLog(octx, cfg)
	cancel()
	if err != nil {
		return exitcode.Wrap(exitcode.Failed, fmt.Errorf("open the log: %w", err))
	}
	defer lg.Close()
	p := &primary{
		log: log, out: out, node: node, svc: svc,
		where: place{pid: cfg.PID, leave: func() error { return removeVIP(cfg) }},
		lg:    lg, store: lg.Store(stream.StoreOptions{}), url: lg.URL(), criu: criu,
		rules: &tcpwrap.Rules{
			Name: instance(cfg.Name, cfg.RunDir), VIP: svc.VIP.Addr(), Ports: svc.Ports, Dev: svc.Dev, Mark: packetMark,
		},
		exited: watch.Exited(), ended: make(chan error, 1), wanted: make(chan wanted),
		standbys: map[string]control.Standby{}, seen: map[string]time.Time{}, role: control.RolePrimary,
	}
	if p.dir, err = imageDir(cfg.Common, cfg.Name+"-primary"); err != nil {
		return err
	}
	defer os.RemoveAll(p.dir)
	if err := p.claim(ctx, watch); err != nil {
		return err
	}
	sctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		if err := ctl.Serve(sctx, p); err != nil && sctx.Err() == nil {
			log.Error("control socket", "err", err)
		}
	}()
	return p.run(ctx)
}

// examine finds out whether this process can be protected at this address.
func examine(ctx context.Context, cfg config.Protect) (service, error) {
	svc := service{Name: cfg.Name, VIP: cfg.VIP, Ports: cfg.Ports, Dev: cfg.Dev, Interval: cfg.Interval}
	if len(svc.Ports) == 0 {
		return svc, exitcode.Errorf(exitcode.Unsuitable, "pid %d does not listen on %s: bind the server to that address (or to all), or give the right --vip", cfg.PID, cfg.VIP.Addr())
	}
	if err := checkVIP(ctx, cfg); err != nil {
		return svc, err
	}
	return svc, nil
}

// checkVIP makes sure that the address is here and nowhere else.
func checkVIP(ctx context.Context, cfg config.Protect) error {
	link, err := netlink.LinkByName(cfg.Dev)
	if err != nil {
		return exitcode.Wrap(exitcode.Config, fmt.Errorf("find interface %s: %w", cfg.Dev, err))
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", cfg.Dev, err)
	}
	here := false
	for _, a := range addrs {
		here = here || a.IP.Equal(net.IP(cfg.VIP.Addr().AsSlice()))
	}
	if !here {
		return exitcode.Errorf(exitcode.Config, "%s is not an address of %s: add it (ip addr add %s dev %s) and bind the server to it, or give the right --vip and --dev",
			cfg.VIP.Addr(), cfg.Dev, cfg.VIP, cfg.Dev)
	}
	mac, used, err := l2.Probe(ctx, cfg.Dev, cfg.VIP.Addr(), probeTime)
	if err != nil {
		return fmt.Errorf("ask the network for %s: %w", cfg.VIP.Addr(), err)
	}
	if used {
		return exitcode.Errorf(exitcode.Config, "%s is in use on the network by %s as well: another host serves it (was it taken over?); find it before you protect this one", cfg.VIP.Addr(), mac)
	}
	return nil
}

func removeVIP(cfg config.Protect) error {
	link, err := netlink.LinkByName(cfg.Dev)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", cfg.Dev, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", cfg.Dev, err)
	}
	for i := range addrs {
		if addrs[i].IP.Equal(net.IP(cfg.VIP.Addr().AsSlice())) {
			if err := netlink.AddrDel(link, &addrs[i]); err != nil {
				return fmt.Errorf("remove %s from %s: %w", cfg.VIP, cfg.Dev, err)
			}
		}
	}
	return nil
}

// logConfig says where a service's log is; embed is where to listen when it is
// in this process.
func logConfig(name, join, url string) (c stream.Config, embed string, err error) {
	c = stream.Config{Service: name, Join: join}
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

func openLog(ctx context.Context, cfg config.Protect) (*stream.Log, error) {
	c, _, err := logConfig(cfg.Name, cfg.Join, cfg.Log)
	if err != nil {
		return nil, err
	}
	return stream.Open(ctx, c)
}

// claim becomes the primary: fence first, then packet rules, then the first
// record.
func (p *primary) claim(ctx context.Context, watch *tcpwrap.ProcWatch) error {
	prev, err := p.mayClaim(ctx)
	if err != nil {
		return err
	}
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
	p.drv = newDriver(q, p.log)
	p.drv.dying, p.drv.failed = watch.Dying, p.end
	p.w.OnStable(p.drv.stable)
	m := tcpwrap.NewMachine(p.w.Next(), p.nextConn, tcpwrap.DefaultLimits())
	p.drv.with(func() {
		p.drv.machine, p.drv.writer = m, p.w
		m.Append(stream.Hello{Config: p.svc.hello()})
	})
	p.drv.start()
	if err := p.rules.Install(); err != nil {
		_ = p.drv.close()
		_ = p.w.Close()
		return exitcode.Wrap(exitcode.Unsuitable, fmt.Errorf("install packet rules: %w", err))
	}
	return nil
}

// mayClaim reads who was the primary. A node that lives keeps its service: a
// restarted agent of a server that was taken over must not win it back, and it
// leaves the rules that keep the old server silent.
func (p *primary) mayClaim(ctx context.Context) (prev stream.StreamSeq, err error) {
	f, err := p.lg.LastFence(ctx)
	if errors.Is(err, stream.ErrMissing) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the newest fence: %w", err)
	}
	if f.Node != p.node {
		there, err := alive(ctx, p.lg, f.Node)
		if err != nil {
			return 0, err
		}
		if there {
			return 0, exitcode.Errorf(exitcode.Fenced, "%s is served by node %s (epoch %d): this server is not the service any more", p.svc.Name, f.Node, f.Epoch)
		}
	}
	l, err := readLegacy(ctx, p.lg, p.store)
	p.lastID, p.nextConn = l.gen.ID, l.nextConn
	return f.Seq, err
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
		if b.Role == rolePrimary && b.Node == node {
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
