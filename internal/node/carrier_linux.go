package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/nsthread"
	"github.com/ftckpt/ftckpt/stream"
)

// isUp are the flags of a link that is up and has a carrier.
const isUp = unix.IFF_UP | unix.IFF_LOWER_UP

// watchLink calls changed, from one goroutine, whenever the link of that name in
// the network namespace ns ("" is the caller's own) loses its carrier or has it
// again, until ctx ends. A link that is down from the start is reported as well;
// one that is up is not.
func watchLink(ctx context.Context, ns, dev string, log *slog.Logger, changed func(up bool, index int)) error {
	updates := make(chan netlink.LinkUpdate, 16)
	err := nsthread.InNamed(ns, func() error {
		return netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
			ListExisting: true,
			ErrorCallback: func(err error) {
				if ctx.Err() == nil {
					log.Warn("watch the link", "dev", dev, "err", err)
				}
			},
		})
	})
	if err != nil {
		return fmt.Errorf("watch the link %s: %w", dev, err)
	}
	go func() {
		was := true
		for u := range updates {
			up := u.Header.Type != unix.RTM_DELLINK && u.Link.Attrs().RawFlags&isUp == isUp
			if u.Link.Attrs().Name != dev || was == up {
				continue
			}
			was = up
			changed(up, u.Link.Attrs().Index)
		}
	}()
	return nil
}

// watchCarrier sees to it that nothing of the service waits in this host for a
// link that is down. The kernel keeps packets for a neighbour it cannot ask for,
// and sends them when the link is back: by then another node may long be the
// primary (promise 3). Without a carrier nothing is released, and what waits in
// the kernel is thrown away, which to TCP is loss. When the link is back, the
// log must first have taken a record: until then this node may have been fenced.
func (p *primary) watchCarrier(ctx context.Context) error {
	callOff := func() {} // of the proof under way
	return watchLink(ctx, p.where.netns, p.where.dev, p.log, func(up bool, index int) {
		callOff()
		if !up {
			p.unplugged(index)
			return
		}
		var pctx context.Context
		pctx, callOff = context.WithCancel(ctx)
		go p.pluggedIn(pctx)
	})
}

func (p *primary) unplugged(index int) {
	p.drv.unplugged.Store(true)
	p.drv.with(func() { p.drv.doubtful(time.Now()) })
	p.log.Warn("the link is down: nothing of the service leaves", "dev", p.where.dev)
	if err := p.forgetNeighbours(index); err != nil {
		p.log.Warn("throw away what waits for the link", "err", err)
	}
}

// pluggedIn lets the service speak again once the log has taken a record.
func (p *primary) pluggedIn(ctx context.Context) {
	var proof stream.Position
	p.drv.with(func() { proof = p.drv.machine.Append(stream.Hello{Config: p.svc.hello()}) })
	if err := p.stableTo(ctx, proof); err != nil {
		return // fenced, or the link is down again: whoever knows says so
	}
	p.log.Info("the link is back", "dev", p.where.dev)
	p.drv.unplugged.Store(false)
	p.drv.with(func() { p.drv.doubtful(time.Now()) })
}

// forgetNeighbours drops the packets that wait for an answer to "who has".
func (p *primary) forgetNeighbours(index int) error {
	return nsthread.InNamed(p.where.netns, func() error {
		neighbours, err := netlink.NeighList(index, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list neighbours: %w", err)
		}
		for i := range neighbours {
			n := &neighbours[i]
			if n.State&unix.NUD_INCOMPLETE == 0 {
				continue
			}
			if n.HardwareAddr == nil { // it has none yet, and the library wants one
				n.HardwareAddr = make(net.HardwareAddr, 6)
			}
			if err := netlink.NeighDel(n); err != nil {
				return fmt.Errorf("forget neighbour %s: %w", n.IP, err)
			}
		}
		return nil
	})
}
