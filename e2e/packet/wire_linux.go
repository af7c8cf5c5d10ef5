package packet

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/lab"
)

const (
	etherLen  = 14
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	frameMax  = 1 << 17 // a veth hands over super-segments
	arpEvery  = 200 * time.Millisecond
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// Wire is a network card with an address that no kernel knows: what is sent to
// it is answered by scripts alone. IPv4 over Ethernet.
type Wire struct {
	addr   netip.Addr
	server netip.AddrPort
	mac    net.HardwareAddr
	c      *packet.Conn
	done   chan struct{}

	mu    sync.Mutex
	peers map[uint16]*peer
	at    net.HardwareAddr // where the server's address was last
	heard chan struct{}    // closed when at is known
	stray []string
}

// Open makes the wire: addr is the scripts' own address, on the host's eth0.
func Open(h *lab.Host, addr netip.Addr, server netip.AddrPort) (*Wire, error) {
	w := &Wire{addr: addr, server: server, done: make(chan struct{}), peers: map[uint16]*peer{}, heard: make(chan struct{})}
	err := h.Do(func() error {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		w.mac = dev.HardwareAddr
		w.c, err = packet.Listen(dev, packet.Raw, unix.ETH_P_ALL, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open wire on %s: %w", h.Name(), err)
	}
	go w.receive()
	return w, nil
}

// Close ends it.
func (w *Wire) Close() error {
	err := w.c.Close()
	<-w.done
	return err
}

// Strays are the ICMP messages that came for no connection of a script.
func (w *Wire) Strays() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.stray...)
}

func (w *Wire) add(p *peer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.peers[p.local.Port()] = p
}

// Resolve waits until it is known where the server's address is.
func (w *Wire) Resolve(ctx context.Context) error {
	t := time.NewTicker(arpEvery)
	defer t.Stop()
	for {
		if err := w.arp(1, broadcast, w.server.Addr(), nil); err != nil {
			return err
		}
		select {
		case <-w.heard:
			return nil
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("resolve %s: %w", w.server.Addr(), ctx.Err())
		}
	}
}

// send puts an IP packet on the wire, to where the server's address was heard
// of last.
func (w *Wire) send(ip []byte) error {
	w.mu.Lock()
	to := w.at
	w.mu.Unlock()
	if len(ip) == 0 {
		return errors.New("no such packet")
	}
	return w.frame(to, etherIPv4, ip)
}

func (w *Wire) frame(to net.HardwareAddr, kind uint16, payload []byte) error {
	b := append(append(make([]byte, 0, etherLen+len(payload)), to...), w.mac...)
	b = binary.BigEndian.AppendUint16(b, kind)
	_, err := w.c.WriteTo(append(b, payload...), &packet.Addr{HardwareAddr: to})
	return err
}

// arp sends a request (1) or a reply (2).
func (w *Wire) arp(op byte, to net.HardwareAddr, ask netip.Addr, target net.HardwareAddr) error {
	b := []byte{0, 1, 8, 0, 6, 4, 0, op}
	b = append(append(b, w.mac...), w.addr.AsSlice()...)
	if target == nil {
		target = make(net.HardwareAddr, 6)
	}
	return w.frame(to, etherARP, append(append(b, target...), ask.AsSlice()...))
}

func (w *Wire) receive() {
	defer close(w.done)
	b := make([]byte, frameMax)
	for {
		n, _, err := w.c.ReadFrom(b)
		if err != nil {
			return
		}
		f := b[:n]
		if n < etherLen || bytes.Equal(f[6:12], w.mac) { // our own
			continue
		}
		switch binary.BigEndian.Uint16(f[12:]) {
		case etherARP:
			w.gotARP(f[etherLen:])
		case etherIPv4:
			w.gotIP(f[etherLen:])
		}
	}
}

func (w *Wire) gotARP(a []byte) {
	if len(a) < 28 {
		return
	}
	mac, from, to := net.HardwareAddr(bytes.Clone(a[8:14])), netip.AddrFrom4([4]byte(a[14:18])), netip.AddrFrom4([4]byte(a[24:28]))
	if from == w.server.Addr() {
		w.mu.Lock()
		if w.at == nil {
			close(w.heard)
		}
		w.at = mac
		w.mu.Unlock()
	}
	if to == w.addr && a[7] == 1 {
		_ = w.arp(2, mac, from, mac) // asked again when it is lost
	}
}

func (w *Wire) gotIP(p []byte) {
	if len(p) < 20 || netip.AddrFrom4([4]byte(p[16:20])) != w.addr {
		return
	}
	hdr := int(p[0]&15) * 4
	if len(p) < hdr+8 {
		return
	}
	switch p[9] {
	case unix.IPPROTO_TCP:
		w.mu.Lock()
		peer := w.peers[binary.BigEndian.Uint16(p[hdr+2:])]
		w.mu.Unlock()
		if peer != nil {
			peer.receive(p)
		}
	case unix.IPPROTO_ICMP:
		w.gotICMP(p[hdr:], netip.AddrFrom4([4]byte(p[12:16])))
	}
}

// gotICMP finds whose packet an ICMP message is about.
func (w *Wire) gotICMP(m []byte, from netip.Addr) {
	kind := fmt.Sprintf("type-%d-code-%d", m[0], m[1])
	if m[0] == 3 && m[1] < 5 {
		kind = [...]string{"net-unreachable", "host-unreachable", "protocol-unreachable", "port-unreachable", "too-big"}[m[1]]
	}
	w.mu.Lock()
	var about *peer
	if len(m) >= 8+20 {
		inner := m[8:]
		if hdr := int(inner[0]&15) * 4; len(inner) >= hdr+4 {
			about = w.peers[binary.BigEndian.Uint16(inner[hdr:])]
		}
	}
	if about == nil {
		w.stray = append(w.stray, fmt.Sprintf("%s from %s", kind, from))
	}
	w.mu.Unlock()
	switch {
	case about == nil:
	case from == w.server.Addr() && m[0] == 3 && m[1] < 2:
		// RFC 6069: the new primary asks a client that has waited for long to
		// retransmit. A dying host's own come from its own address.
		about.remark("icmp " + kind)
	default:
		about.told(kind)
	}
}
