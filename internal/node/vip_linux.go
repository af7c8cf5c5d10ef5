package node

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/l2"
)

// probeTime is how long an address probe listens for another owner.
const probeTime = 600 * time.Millisecond

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
