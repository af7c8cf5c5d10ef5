package l2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
)

// Neighbour discovery's numbers (RFC 4861).
const (
	ndHopLimit = 255  // section 6.1: anything less has crossed a router
	naOverride = 0x20 // section 4.4: replace what the cache holds
	ipv6Len    = 40
	ndBodyLen  = 24 // ICMPv6 header, reserved word, target
	icmpv6NS   = layers.ICMPv6TypeNeighborSolicitation
	icmpv6NA   = layers.ICMPv6TypeNeighborAdvertisement
)

var (
	allNodes    = netip.MustParseAddr("ff02::1")
	allNodesMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
)

// UnsolicitedNA returns the frame to all nodes that tells a segment that addr
// is now at mac (RFC 4861 section 7.2.6).
func UnsolicitedNA(mac net.HardwareAddr, addr netip.Addr) ([]byte, error) {
	return neighbour(mac, allNodesMAC, addr, allNodes, addr, icmpv6NA, &layers.ICMPv6NeighborAdvertisement{
		Flags:         naOverride,
		TargetAddress: addr.AsSlice(),
		Options:       layers.ICMPv6Options{{Type: layers.ICMPv6OptTargetAddress, Data: mac}},
	})
}

// ProbeNS returns the frame that asks who has addr without claiming it: a
// solicitation from the unspecified address, without a link-layer option
// (duplicate address detection, RFC 4862 section 5.4.2).
func ProbeNS(mac net.HardwareAddr, addr netip.Addr) ([]byte, error) {
	if !addr.Is6() || addr.Is4In6() {
		return nil, fmt.Errorf("build neighbour solicitation for %v: not an IPv6 address", addr)
	}
	a := addr.As16()
	group := netip.MustParseAddr("ff02::1:ff00:0").As16() // solicited-node, RFC 4291 section 2.7.1
	copy(group[13:], a[13:])
	groupMAC := net.HardwareAddr{0x33, 0x33, group[12], group[13], group[14], group[15]}
	return neighbour(mac, groupMAC, netip.IPv6Unspecified(), netip.AddrFrom16(group), addr, icmpv6NS,
		&layers.ICMPv6NeighborSolicitation{TargetAddress: addr.AsSlice()})
}

func neighbour(mac, dstMAC net.HardwareAddr, src, dst, target netip.Addr, kind uint8, body gopacket.SerializableLayer) ([]byte, error) {
	if len(mac) != macLen {
		return nil, fmt.Errorf("build neighbour discovery for %v: hardware address %q is not Ethernet's", target, mac)
	}
	if !target.Is6() || target.Is4In6() {
		return nil, fmt.Errorf("build neighbour discovery for %v: not an IPv6 address", target)
	}
	ip := &layers.IPv6{
		Version: 6, NextHeader: layers.IPProtocolICMPv6, HopLimit: ndHopLimit,
		SrcIP: src.AsSlice(), DstIP: dst.AsSlice(),
	}
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, 0)}
	if err := icmp.SetNetworkLayerForChecksum(ip); err != nil {
		return nil, fmt.Errorf("build neighbour discovery for %v: %w", target, err)
	}
	buf := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.Ethernet{SrcMAC: mac, DstMAC: dstMAC, EthernetType: layers.EthernetTypeIPv6}, ip, icmp, body)
	if err != nil {
		return nil, fmt.Errorf("build neighbour discovery for %v: %w", target, err)
	}
	return buf.Bytes(), nil
}

// Neighbour is a neighbour solicitation or advertisement.
type Neighbour struct {
	Advertisement bool // else a solicitation
	SenderMAC     net.HardwareAddr
	SenderIP      netip.Addr
	Target        netip.Addr
}

var errNotNeighbour = errors.New("parse neighbour discovery: another kind of packet")

// ParseNeighbour reads an Ethernet frame that holds a neighbour solicitation
// or advertisement without extension headers. The result does not share memory
// with frame.
func ParseNeighbour(frame []byte) (Neighbour, error) {
	if len(frame) < ethernetLen+ipv6Len+ndBodyLen {
		return Neighbour{}, fmt.Errorf("parse neighbour discovery: %d bytes are too few", len(frame))
	}
	ip := frame[ethernetLen:]
	body := ip[ipv6Len:]
	if binary.BigEndian.Uint16(frame[12:]) != uint16(layers.EthernetTypeIPv6) || ip[0]>>4 != 6 ||
		ip[6] != uint8(layers.IPProtocolICMPv6) || ip[7] != ndHopLimit ||
		(body[0] != icmpv6NS && body[0] != icmpv6NA) || body[1] != 0 {
		return Neighbour{}, errNotNeighbour
	}
	return Neighbour{
		Advertisement: body[0] == icmpv6NA,
		SenderMAC:     append(net.HardwareAddr(nil), frame[6:12]...),
		SenderIP:      netip.AddrFrom16([16]byte(ip[8:24])),
		Target:        netip.AddrFrom16([16]byte(body[8:24])),
	}, nil
}

// Claims reports whether n shows that its sender has addr or is about to take
// it (RFC 4862 sections 5.4.3 and 5.4.4).
func (n Neighbour) Claims(addr netip.Addr) bool {
	if n.Target != addr {
		return n.SenderIP == addr
	}
	return n.Advertisement || n.SenderIP.IsUnspecified() || n.SenderIP == addr
}
