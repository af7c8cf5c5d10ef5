package capsule

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Lend makes addresses of another host local to the capsule, so that connections
// from them can be restored there, only to be ended. The network does not see
// them: they are on lo, and the service's device answers for its own address only.
// giveBack takes them away again.
func (c *Capsule) Lend(addrs []netip.Addr) (giveBack func() error, err error) {
	host, inside, err := c.handles()
	if err != nil {
		return nil, err
	}
	host.Close()
	lo, err := inside.LinkByName("lo")
	if err != nil {
		inside.Close()
		return nil, fmt.Errorf("find lo inside: %w", err)
	}
	var lent []*netlink.Addr
	giveBack = func() error {
		defer inside.Close()
		var errs []error
		for _, a := range lent {
			if err := inside.AddrDel(lo, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				errs = append(errs, fmt.Errorf("take %v from lo inside: %w", a.IPNet, err))
			}
		}
		return errors.Join(errs...)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := inside.AddrAdd(lo, addr); err != nil {
			return nil, errors.Join(fmt.Errorf("put %v on lo inside: %w", a, err), giveBack())
		}
		lent = append(lent, addr)
	}
	return giveBack, nil
}
