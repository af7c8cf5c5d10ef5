package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/l2"
)

// probeTime is how long an address probe listens for another owner.
const probeTime = 600 * time.Millisecond

// checkVIPs makes sure that the addresses are here and nowhere else.
func checkVIPs(ctx context.Context, cfg config.Protect) error {
	link, err := netlink.LinkByName(cfg.Dev)
	if err != nil {
		return exitcode.Wrap(exitcode.Config, fmt.Errorf("find interface %s: %w", cfg.Dev, err))
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", cfg.Dev, err)
	}
	for _, v := range cfg.VIPs {
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return isAddr(a, v) }) {
			return exitcode.Errorf(exitcode.Config, "%s is not an address of %s: add it (ip addr add %s dev %s) and bind the server to it, or give the right --vip and --dev",
				v.Addr(), cfg.Dev, v, cfg.Dev)
		}
	}
	errs := make([]error, len(cfg.VIPs))
	var wg sync.WaitGroup
	for i, v := range cfg.VIPs { // all at once: each takes its time
		wg.Go(func() { errs[i] = checkUnused(ctx, cfg.Dev, v.Addr()) })
	}
	wg.Wait()
	for _, err := range errs { // one is enough
		if err != nil {
			return err
		}
	}
	return nil
}

func checkUnused(ctx context.Context, dev string, addr netip.Addr) error {
	mac, used, err := l2.Probe(ctx, dev, addr, probeTime)
	if err != nil {
		return fmt.Errorf("ask the network for %s: %w", addr, err)
	}
	if used {
		return exitcode.Errorf(exitcode.Config, "%s is in use on the network by %s as well: another host serves it (was it taken over?); find it before you protect this one", addr, mac)
	}
	return nil
}

func isAddr(a netlink.Addr, v netip.Prefix) bool { return a.IP.Equal(net.IP(v.Addr().AsSlice())) }

// removeVIPs takes the addresses off this host. One that cannot be removed does
// not keep the others here.
func removeVIPs(cfg config.Protect) error {
	link, err := netlink.LinkByName(cfg.Dev)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", cfg.Dev, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", cfg.Dev, err)
	}
	var errs []error
	for i := range addrs {
		if !slices.ContainsFunc(cfg.VIPs, func(v netip.Prefix) bool { return isAddr(addrs[i], v) }) {
			continue
		}
		if err := netlink.AddrDel(link, &addrs[i]); err != nil {
			errs = append(errs, fmt.Errorf("remove %s from %s: %w", addrs[i].IP, cfg.Dev, err))
		}
	}
	return errors.Join(errs...)
}
