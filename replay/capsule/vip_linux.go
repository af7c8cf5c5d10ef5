package capsule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/l2"
	"github.com/ftckpt/ftckpt/internal/nsthread"
)

// parkingMetric is the worst there is: the parking route never wins against a
// real one.
const parkingMetric = math.MaxInt32

// carrierTimeout bounds the wait for a new link to carry frames. The kernel
// (net/core/link_watch.c) may take up to a second over a change of carrier.
const carrierTimeout = 1500 * time.Millisecond

// handles opens netlink in both network namespaces.
func (c *Capsule) handles() (host, inside *netlink.Handle, err error) {
	if host, err = netlink.NewHandleAt(netns.NsHandle(c.hostns.Fd()), unix.NETLINK_ROUTE); err != nil {
		return nil, nil, fmt.Errorf("open netlink: %w", err)
	}
	if inside, err = netlink.NewHandleAt(netns.NsHandle(c.netns.Fd()), unix.NETLINK_ROUTE); err != nil {
		host.Close()
		return nil, nil, fmt.Errorf("open netlink in the capsule: %w", err)
	}
	return host, inside, nil
}

// PrepareVIPs makes the device with the service's addresses inside the capsule: a
// macvlan in bridge mode on Options.Dev, left down, so that the network sees
// nothing of it. vips are the addresses with the lengths of their networks.
//
// An IPv4 address works at once for everything local: bind, listen, CRIU's
// repair of established sockets, and packets injected over lo. Connections to
// clients get a route over lo of the worst metric until TakeVIP, since connect
// needs one even in repair mode; what is sent over it goes nowhere. IPv6 knows
// neither an address on a device that is down nor such a route: there,
// established sockets can be restored only after TakeVIP.
//
// Preparing the same addresses again does nothing.
func (c *Capsule) PrepareVIPs(vips []netip.Prefix) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return fmt.Errorf("prepare %v: the capsule is closed", vips)
	}
	if len(vips) == 0 {
		return errors.New("prepare addresses: none is given")
	}
	if slices.Equal(c.st.VIPs, vips) {
		return nil
	}
	if len(c.st.VIPs) > 0 {
		return fmt.Errorf("prepare %v: the capsule has %v already: drop it first", vips, c.st.VIPs)
	}
	for _, vip := range vips {
		if !vip.IsValid() || vip.Addr().IsUnspecified() || vip.Addr().IsMulticast() || vip.Addr().Is4In6() {
			return fmt.Errorf("prepare %v: not an address with the length of its network, such as 10.0.0.5/24", vip)
		}
	}
	if c.opt.Dev == "" {
		return fmt.Errorf("prepare %v: no host interface was given", vips)
	}
	// The file first: what is made from here on must be found again.
	st := c.st
	st.VIPs = slices.Clone(vips)
	if err := st.write(c.path); err != nil {
		return err
	}
	c.st = st
	if err := c.makeVIPDev(vips); err != nil {
		return errors.Join(fmt.Errorf("prepare %v on %s: %w", vips, c.opt.Dev, err), c.dropVIP())
	}
	return nil
}

func (c *Capsule) makeVIPDev(vips []netip.Prefix) error {
	host, inside, err := c.handles()
	if err != nil {
		return err
	}
	defer host.Close()
	defer inside.Close()
	parent, err := host.LinkByName(c.opt.Dev)
	if err != nil {
		return fmt.Errorf("find interface: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.opt.VIPDev
	attrs.ParentIndex = parent.Attrs().Index
	attrs.Namespace = netlink.NsFd(c.netns.Fd())
	if err := host.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		return fmt.Errorf("make macvlan %s (the kernel needs CONFIG_MACVLAN, the interface must be Ethernet): %w", c.opt.VIPDev, err)
	}
	dev, err := inside.LinkByName(c.opt.VIPDev)
	if err != nil {
		return fmt.Errorf("find %s inside: %w", c.opt.VIPDev, err)
	}
	if err := nsthread.InNet(c.netns, func() error { return setDevSysctls(c.opt.VIPDev) }); err != nil {
		return err
	}
	for _, vip := range vips {
		addr := &netlink.Addr{IPNet: ipNet(vip)}
		if vip.Addr().Is6() { // nobody waits for duplicate detection: the fence has decided whose it is
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := inside.AddrAdd(dev, addr); err != nil {
			return fmt.Errorf("add address %v: %w", vip, err)
		}
	}
	if !has4(vips) {
		return nil
	}
	park, err := parkingRoute(inside)
	if err != nil {
		return err
	}
	if err := inside.RouteAdd(park); err != nil {
		return fmt.Errorf("add parking route: %w", err)
	}
	return nil
}

func parkingRoute(inside *netlink.Handle) (*netlink.Route, error) {
	lo, err := inside.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo inside: %w", err)
	}
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index, Scope: netlink.SCOPE_LINK, Priority: parkingMetric,
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	}, nil
}

// TakeVIP lets the network see the address: the device goes up, and gets the
// routes of the main table that the host has through Options.Dev at this moment.
// It returns when the device carries frames; clients find it only after
// Announce. Taking again does nothing. When it fails the device is down.
func (c *Capsule) TakeVIP() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.st.VIPs) == 0 {
		return errors.New("take the address: none is prepared")
	}
	if c.taken {
		return nil
	}
	if err := c.takeVIP(); err != nil {
		return fmt.Errorf("take %v on %s: %w", c.st.VIPs, c.opt.Dev, err)
	}
	c.taken = true
	return nil
}

func (c *Capsule) takeVIP() (err error) {
	host, inside, err := c.handles()
	if err != nil {
		return err
	}
	defer host.Close()
	defer inside.Close()
	parent, err := host.LinkByName(c.opt.Dev)
	if err != nil {
		return fmt.Errorf("find interface: %w", err)
	}
	dev, err := inside.LinkByName(c.opt.VIPDev)
	if err != nil {
		return fmt.Errorf("find %s inside: %w", c.opt.VIPDev, err)
	}
	hostRoutes, err := hostRoutes(host, c.st.VIPs)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	if err := inside.LinkSetUp(dev); err != nil {
		return fmt.Errorf("set %s up (is %s up?): %w", c.opt.VIPDev, c.opt.Dev, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, inside.LinkSetDown(dev))
		}
	}()
	for _, r := range inheritRoutes(hostRoutes, parent.Attrs().Index, dev.Attrs().Index) {
		if err := inside.RouteAdd(&r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route %v: %w", r, err)
		}
	}
	if err := awaitCarrier(inside, c.opt.VIPDev); err != nil {
		return err
	}
	if !has4(c.st.VIPs) {
		return nil
	}
	park, err := parkingRoute(inside)
	if err != nil {
		return err
	}
	if err := inside.RouteDel(park); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove parking route: %w", err)
	}
	return nil
}

// inheritRoutes turns the host's unicast routes through interface parent into
// routes through interface dev, those on the link first. The host's preferred
// source addresses do not come along: they are not in the capsule. Gateways are
// on-link, since the address may be of another network than the host's.
func inheritRoutes(routes []netlink.Route, parent, dev int) []netlink.Route {
	var link, via []netlink.Route
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST {
			continue
		}
		hop, gw := r.LinkIndex, r.Gw
		for _, m := range r.MultiPath {
			if m.LinkIndex == parent {
				hop, gw = m.LinkIndex, m.Gw
				break
			}
		}
		if hop != parent || (r.Dst != nil && r.Dst.IP.IsLinkLocalUnicast() && r.Dst.IP.To4() == nil) {
			continue
		}
		n := netlink.Route{
			LinkIndex: dev, Dst: r.Dst, Gw: gw, Scope: r.Scope, Priority: r.Priority, Tos: r.Tos,
			MTU: r.MTU, AdvMSS: r.AdvMSS, Table: unix.RT_TABLE_MAIN,
		}
		if gw == nil {
			link = append(link, n)
		} else {
			n.Flags = int(netlink.FLAG_ONLINK)
			via = append(via, n)
		}
	}
	return append(link, via...)
}

// awaitCarrier returns when name is operationally up: before that the kernel
// drops what it is given to send.
func awaitCarrier(h *netlink.Handle, name string) error {
	for deadline := time.Now().Add(carrierTimeout); ; time.Sleep(time.Millisecond) {
		dev, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if dev.Attrs().RawFlags&unix.IFF_RUNNING != 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has no carrier after %v: is the cable of the host's interface in?", name, carrierTimeout)
		}
	}
}

// DropVIP takes the address away from the network and removes the device.
// Announcements stop. Sockets inside stay as they are and reach nobody.
func (c *Capsule) DropVIP() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.announce.stop()
	if c.closed {
		return nil
	}
	return c.dropVIP()
}

func (c *Capsule) dropVIP() error {
	if len(c.st.VIPs) == 0 {
		return nil
	}
	fail := func(err error) error { return fmt.Errorf("drop %v: %w", c.st.VIPs, err) }
	host, inside, err := c.handles()
	if err != nil {
		return fail(err)
	}
	defer host.Close()
	defer inside.Close()
	dev, err := inside.LinkByName(c.opt.VIPDev)
	var gone netlink.LinkNotFoundError
	switch {
	case errors.As(err, &gone):
	case err != nil:
		return fail(err)
	default:
		if err := inside.LinkDel(dev); err != nil {
			return fail(err)
		}
	}
	c.taken = false
	if has4(c.st.VIPs) {
		if park, err := parkingRoute(inside); err == nil {
			_ = inside.RouteDel(park) // it is there only before TakeVIP
		}
	}
	c.st.VIPs = nil
	select {
	case <-c.done: // the file no longer matters
		return nil
	default:
	}
	if err := c.st.write(c.path); err != nil {
		return fail(err)
	}
	return nil
}

// lookUp finds out how far an adopted capsule's address has come.
func (c *Capsule) lookUp() error {
	if len(c.st.VIPs) == 0 {
		return nil
	}
	host, inside, err := c.handles()
	if err != nil {
		return err
	}
	defer host.Close()
	defer inside.Close()
	dev, err := inside.LinkByName(c.opt.VIPDev)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) { // the agent died between the file and the device
		c.st.VIPs = nil
		return c.st.write(c.path)
	}
	if err != nil {
		return err
	}
	c.taken = dev.Attrs().Flags&net.FlagUp != 0
	return nil
}

// announceAgain is when Announce repeats, from its first round: at once for a
// lost frame, later for a switch that was still learning (spanning tree).
var announceAgain = []time.Duration{
	20 * time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second,
}

// announceEvery is how often a host says that it has the addresses. A node that was
// stopped in the midst of a takeover and goes on after another's announces them
// once, before it learns that it is fenced; without this, clients would ask it for
// as long as their neighbour tables believe it.
const announceEvery = 10 * time.Second

func keepAnnouncing(ctx context.Context, all announcers, log *slog.Logger) {
	t := time.NewTicker(announceEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if err := all.send(); err != nil {
			log.Debug("announce the addresses", "err", err)
		}
	}
}

// Announce tells the network at once where the addresses live now, again six times
// within five seconds in the background, and every ten seconds from then on, until
// ctx ends or the addresses are dropped. The error is of the first round.
func (c *Capsule) Announce(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || !c.taken {
		return errors.New("announce the address: it is not taken")
	}
	c.announce.stop()
	all, err := c.announcers()
	if err == nil {
		err = all.send()
	}
	c.announce.start(ctx, func(ctx context.Context) {
		defer all.close() // here, because it is slow
		if err != nil {
			return
		}
		start := time.Now()
		for _, after := range announceAgain {
			t := time.NewTimer(time.Until(start.Add(after)))
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-t.C:
			}
			if err := all.send(); err != nil {
				c.log().Warn("repeat the announcement of the addresses", "err", err)
			}
		}
		keepAnnouncing(ctx, all, c.log())
	})
	return err
}

// announcers are one for each address.
type announcers []*l2.Announcer

func (c *Capsule) announcers() (all announcers, err error) {
	err = c.Do(func() error {
		for _, vip := range c.st.VIPs {
			a, err := l2.NewAnnouncer(c.opt.VIPDev, vip.Addr())
			if err != nil {
				return err
			}
			all = append(all, a)
		}
		return nil
	})
	return all, err
}

func (all announcers) send() error {
	var errs []error
	for _, a := range all {
		errs = append(errs, a.Send())
	}
	return errors.Join(errs...)
}

func (all announcers) close() {
	for _, a := range all {
		_ = a.Close() // nothing was written that could be lost
	}
}

// announcer runs at most one background announcement. Capsule.mu guards it.
type announcer struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func (a *announcer) start(ctx context.Context, fn func(context.Context)) {
	ctx, a.cancel = context.WithCancel(ctx)
	a.wg.Go(func() { fn(ctx) })
}

// stop returns when nothing is sent any more.
func (a *announcer) stop() {
	if a.cancel != nil {
		a.cancel()
		a.cancel = nil
	}
	a.wg.Wait()
}

func has4(vips []netip.Prefix) bool {
	return slices.ContainsFunc(vips, func(p netip.Prefix) bool { return p.Addr().Is4() })
}

// hostRoutes are the main table's, of the address families of vips.
func hostRoutes(host *netlink.Handle, vips []netip.Prefix) (all []netlink.Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		of := func(p netip.Prefix) bool { return p.Addr().Is6() == (family == netlink.FAMILY_V6) }
		if !slices.ContainsFunc(vips, of) {
			continue
		}
		routes, err := host.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, err
		}
		all = append(all, routes...)
	}
	return all, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
