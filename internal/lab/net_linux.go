package lab

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	bridgeName = "br0"
	deviceName = "eth0"
)

// handle returns a netlink handle of the space's network namespace.
func (s *space) handle() (*netlink.Handle, error) {
	var h *netlink.Handle
	err := s.inside(unix.CLONE_NEWNET, func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink of %s: %w", s.name, err)
	}
	return h, nil
}

// buildSwitch makes the bridge of the switch.
func buildSwitch(sw *space) error {
	// A bridge that calls iptables would run the frames through rules of a
	// host that is no host.
	err := sw.inside(unix.CLONE_NEWNET, func() error {
		for _, f := range []string{"iptables", "ip6tables", "arptables"} {
			err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+f, []byte("0"), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) { // no br_netfilter: nothing to switch off
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("switch off bridge netfilter: %w", err)
	}
	h, err := sw.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	snoop := false
	la := netlink.NewLinkAttrs()
	la.Name = bridgeName
	br := &netlink.Bridge{LinkAttrs: la, MulticastSnooping: &snoop}
	if err := h.LinkAdd(br); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	// Netlink's bridge attributes for these are not in the library; a new
	// bridge has STP off, and without STP a port forwards at once whatever
	// forward_delay says. Set it all the same, as the file system allows.
	err = sw.inside(unix.CLONE_NEWNET|unix.CLONE_NEWNS, func() error {
		for f, v := range map[string]string{"stp_state": "0", "forward_delay": "0"} {
			if err := os.WriteFile("/sys/class/net/"+bridgeName+"/bridge/"+f, []byte(v), 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("configure bridge: %w", err)
	}
	if err := h.LinkSetUp(br); err != nil {
		return fmt.Errorf("set bridge up: %w", err)
	}
	return nil
}

// plug connects a host's eth0 to a port of the switch that has the host's name.
func plug(sw *space, host *space, port string, index int, addr *netlink.Addr) error {
	hs, err := sw.handle()
	if err != nil {
		return err
	}
	defer hs.Close()
	hh, err := host.handle()
	if err != nil {
		return err
	}
	defer hh.Close()
	ns, err := netns.GetFromPid(host.init.Process.Pid)
	if err != nil {
		return fmt.Errorf("open network namespace of %s: %w", host.name, err)
	}
	defer ns.Close()

	la := netlink.NewLinkAttrs()
	la.Name = port
	// Addresses that a person can tell apart in a capture.
	mac := func(side byte) net.HardwareAddr {
		return net.HardwareAddr{0x02, 0xfc, side, 0, byte(index >> 8), byte(index)}
	}
	la.HardwareAddr = mac(1)
	veth := &netlink.Veth{LinkAttrs: la, PeerName: deviceName, PeerHardwareAddr: mac(0), PeerNamespace: netlink.NsFd(ns)}
	if err := hs.LinkAdd(veth); err != nil {
		return fmt.Errorf("add link of %s: %w", host.name, err)
	}
	br, err := hs.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	if err := hs.LinkSetMaster(veth, br); err != nil {
		return fmt.Errorf("plug %s into the bridge: %w", host.name, err)
	}
	if err := hs.LinkSetUp(veth); err != nil {
		return fmt.Errorf("set port of %s up: %w", host.name, err)
	}
	for _, name := range []string{"lo", deviceName} {
		l, err := hh.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s of %s: %w", name, host.name, err)
		}
		if name == deviceName && addr != nil {
			if err := hh.AddrAdd(l, addr); err != nil {
				return fmt.Errorf("add address %v to %s: %w", addr, host.name, err)
			}
		}
		if err := hh.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s of %s up: %w", name, host.name, err)
		}
	}
	return nil
}

// parseAddr parses "10.77.0.2/24". IPv6 addresses skip duplicate detection: in
// a lab nobody else can have them, and nobody wants to wait.
func parseAddr(cidr string) (*netlink.Addr, error) {
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return nil, fmt.Errorf("parse address %q (want ADDR/LEN): %w", cidr, err)
	}
	if a.IP.To4() == nil {
		a.Flags |= unix.IFA_F_NODAD
	}
	return a, nil
}
