// Package l2 tells a network segment where an address lives now, and asks it
// whether the address lives anywhere yet.
//
// Building and parsing frames is pure (arp.go, ndp.go); Announce and Probe in
// l2_linux.go put them on a packet socket of an Ethernet-like interface. Both
// act in the network namespace of the calling thread and need CAP_NET_RAW.
//
// IPv4 uses ARP (RFC 826, RFC 5227), IPv6 uses neighbour discovery (RFC 4861).
// What arrives from the network is read without trust: a frame that is not
// exactly what is expected is an error, never a panic.
package l2

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// Operation is the opcode of an ARP packet.
type Operation uint16

// Operations.
const (
	Request Operation = layers.ARPRequest
	Reply   Operation = layers.ARPReply
)

// ARP is an Ethernet/IPv4 ARP packet.
type ARP struct {
	Op        Operation
	SenderMAC net.HardwareAddr
	SenderIP  netip.Addr
	TargetMAC net.HardwareAddr
	TargetIP  netip.Addr
}

var (
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	noMAC     = net.HardwareAddr{0, 0, 0, 0, 0, 0}
)

const (
	macLen      = 6
	ethernetLen = 14
	arpLen      = 28
)

// GratuitousARP returns the broadcast frames that tell a segment that addr is
// now at mac: one request and one reply, since stacks differ in which of them
// they update their cache from. Linux takes the reply for gratuitous, and so
// skips its one second of locktime, only if its target hardware address is the
// sender's own (arp_is_garp in net/ipv4/arp.c).
func GratuitousARP(mac net.HardwareAddr, addr netip.Addr) (request, reply []byte, err error) {
	request, err = ARP{Op: Request, SenderMAC: mac, SenderIP: addr, TargetMAC: noMAC, TargetIP: addr}.broadcast()
	if err != nil {
		return nil, nil, err
	}
	reply, err = ARP{Op: Reply, SenderMAC: mac, SenderIP: addr, TargetMAC: mac, TargetIP: addr}.broadcast()
	return request, reply, err
}

// ProbeARP returns the broadcast frame that asks who has addr without claiming
// it: the sender address is 0.0.0.0, so that nobody's cache changes (RFC 5227
// section 2.1.1).
func ProbeARP(mac net.HardwareAddr, addr netip.Addr) ([]byte, error) {
	return ARP{Op: Request, SenderMAC: mac, SenderIP: netip.IPv4Unspecified(), TargetMAC: noMAC, TargetIP: addr}.broadcast()
}

// broadcast returns a as an Ethernet frame to everyone, padded to 60 bytes.
func (a ARP) broadcast() ([]byte, error) {
	if len(a.SenderMAC) != macLen || len(a.TargetMAC) != macLen {
		return nil, fmt.Errorf("build arp for %v: hardware addresses %q and %q are not both Ethernet's", a.TargetIP, a.SenderMAC, a.TargetMAC)
	}
	if !a.SenderIP.Is4() || !a.TargetIP.Is4() {
		return nil, fmt.Errorf("build arp for %v: not an IPv4 address", a.TargetIP)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true},
		&layers.Ethernet{SrcMAC: a.SenderMAC, DstMAC: broadcast, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{
			AddrType:          layers.LinkTypeEthernet,
			Protocol:          layers.EthernetTypeIPv4,
			Operation:         uint16(a.Op),
			SourceHwAddress:   a.SenderMAC,
			SourceProtAddress: a.SenderIP.AsSlice(),
			DstHwAddress:      a.TargetMAC,
			DstProtAddress:    a.TargetIP.AsSlice(),
		})
	if err != nil {
		return nil, fmt.Errorf("build arp for %v: %w", a.TargetIP, err)
	}
	return buf.Bytes(), nil
}

// ParseARP reads an Ethernet frame that holds an Ethernet/IPv4 ARP packet. The
// result does not share memory with frame.
func ParseARP(frame []byte) (ARP, error) {
	if len(frame) < ethernetLen+arpLen {
		return ARP{}, fmt.Errorf("parse arp: %d bytes are too few", len(frame))
	}
	if t := binary.BigEndian.Uint16(frame[12:]); t != uint16(layers.EthernetTypeARP) {
		return ARP{}, fmt.Errorf("parse arp: ethertype %#04x", t)
	}
	body := frame[ethernetLen:]
	// Before gopacket sees it: its length check adds in a uint8 and overflows, so
	// that large address sizes make it panic (v1.1.19).
	if body[4] != macLen || body[5] != net.IPv4len {
		return ARP{}, fmt.Errorf("parse arp: address sizes %d and %d", body[4], body[5])
	}
	var p layers.ARP
	if err := p.DecodeFromBytes(body, gopacket.NilDecodeFeedback); err != nil {
		return ARP{}, fmt.Errorf("parse arp: %w", err)
	}
	if p.AddrType != layers.LinkTypeEthernet || p.Protocol != layers.EthernetTypeIPv4 {
		return ARP{}, fmt.Errorf("parse arp: hardware type %d, protocol %v", p.AddrType, p.Protocol)
	}
	return ARP{
		Op:        Operation(p.Operation),
		SenderMAC: append(net.HardwareAddr(nil), p.SourceHwAddress...),
		SenderIP:  netip.AddrFrom4([4]byte(p.SourceProtAddress)),
		TargetMAC: append(net.HardwareAddr(nil), p.DstHwAddress...),
		TargetIP:  netip.AddrFrom4([4]byte(p.DstProtAddress)),
	}, nil
}

// Claims reports whether a shows that its sender has addr or is about to take
// it: any packet sent from addr, or another host's probe for it (RFC 5227
// section 2.1.1).
func (a ARP) Claims(addr netip.Addr) bool {
	if a.SenderIP == addr {
		return true
	}
	return a.Op == Request && a.SenderIP.IsUnspecified() && a.TargetIP == addr
}
