package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/gopacket/pcapgo"

	"github.com/ftckpt/ftckpt/internal/lab"
)

// frame is what tests want to know of a captured frame.
type frame struct {
	at   time.Time
	text string
}

// spokeAsVIP lists what a host sent in the service's name from a moment on, as
// the switch saw it: TCP segments with the VIP as their source, and ARP that
// claims it.
func (w *world) spokeAsVIP(h *lab.Host, since time.Time) []frame {
	w.Helper()
	mac := w.mac(h)
	var out []frame
	w.frames(h, func(at time.Time, p gopacket.Packet) {
		eth, ok := p.LinkLayer().(*layers.Ethernet)
		if !ok || at.Before(since) || eth.SrcMAC.String() != mac {
			return
		}
		if ip, ok := p.NetworkLayer().(*layers.IPv4); ok && ip.SrcIP.String() == vip {
			text := fmt.Sprintf("%v > %v %v", ip.SrcIP, ip.DstIP, ip.Protocol)
			if tcp, ok := p.TransportLayer().(*layers.TCP); ok {
				text = fmt.Sprintf("%v > %v:%v seq %d ack %d syn=%v fin=%v rst=%v, %d bytes", ip.SrcIP, ip.DstIP, tcp.DstPort, tcp.Seq, tcp.Ack, tcp.SYN, tcp.FIN, tcp.RST, len(tcp.Payload))
			}
			out = append(out, frame{at, text})
		}
		if arp, ok := p.Layer(layers.LayerTypeARP).(*layers.ARP); ok && net.IP(arp.SourceProtAddress).String() == vip {
			out = append(out, frame{at, fmt.Sprintf("ARP: %s is at %s (operation %d)", vip, mac, arp.Operation)})
		}
	})
	return out
}

// frames reads the capture of a host so far. tcpdump -U writes whole frames,
// the last of which may be under way.
func (w *world) frames(h *lab.Host, f func(time.Time, gopacket.Packet)) {
	w.Helper()
	file, err := os.Open(w.dir + "/" + h.Name() + ".pcap")
	w.must(err)
	defer file.Close()
	r, err := pcapgo.NewReader(file)
	w.must(err)
	for {
		data, ci, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return
		}
		w.must(err)
		f(ci.Timestamp, gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.DecodeOptions{Lazy: true, NoCopy: true}))
	}
}

// mac is the hardware address of a host.
func (w *world) mac(h *lab.Host) string {
	w.Helper()
	var mac string
	w.must(h.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			mac = i.HardwareAddr.String()
		}
		return err
	}))
	return mac
}

// silent fails the test for what a host sent in the service's name.
func (w *world) silent(h *lab.Host, since time.Time) {
	w.Helper()
	frames := w.spokeAsVIP(h, since)
	for i, f := range frames {
		if i == 10 {
			w.Errorf("and %d more", len(frames)-i)
			break
		}
		w.Errorf("%s spoke as the service %v after it should have been silent: %s", h.Name(), f.at.Sub(since), f.text)
	}
}
