package tcpwrap

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSocketsAndTheirEnd(t *testing.T) {
	for _, bind := range []netip.Addr{labServer4, netip.IPv6Unspecified(), labServer6} {
		t.Run(bind.String(), func(t *testing.T) {
			vip := bind
			if bind.IsUnspecified() {
				vip = labServer4 // reached through a socket of both families
			}
			l := newLab(t)
			ended := make(chan error, 1)
			l.serve(t, bind, func(c *net.TCPConn) {
				_, err := io.Copy(io.Discard, c)
				ended <- err
			})
			newTap(t, l.open(t), func(p caught) Verdict {
				if p.Dir == Outbound && p.Seg.Flags.Has(RST) {
					return Drop
				}
				return Accept
			})
			l.install(t, vip)
			c := l.dial(t, vip)
			ports := []uint16{1, labPort}
			var conns, listeners []Socket
			eventually(t, "a listener and a connection", func() bool {
				all, err := Sockets(l.server, []netip.Addr{vip}, ports)
				if err != nil {
					t.Fatal(err)
				}
				conns, listeners = nil, nil
				for _, s := range all {
					if s.State == TCPListen {
						listeners = append(listeners, s)
					} else {
						conns = append(conns, s)
					}
				}
				return len(listeners) == 1 && len(conns) == 1 && conns[0].State == TCPEstablished && conns[0].Inode != 0
			})
			if got := conns[0]; got.Remote.String() != c.LocalAddr().String() || got.Local != netip.AddrPortFrom(vip, labPort) {
				t.Errorf("connection %+v", got)
			}
			if n, err := DestroySockets(l.server, []netip.Addr{vip}, ports); err != nil || n != 1 {
				t.Errorf("destroyed %d, %v", n, err)
			}
			if err := <-ended; !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the server's socket ended with %v", err)
			}
			silent(t, c)
			all, err := Sockets(l.server, []netip.Addr{vip}, ports)
			if err != nil || len(all) != 1 || all[0].State != TCPListen {
				t.Errorf("left %+v, %v", all, err)
			}
			if other, err := Sockets(l.server, []netip.Addr{vip}, []uint16{1}); err != nil || len(other) != 0 {
				t.Errorf("sockets of another port: %+v, %v", other, err)
			}
		})
	}
}

// An orphan: the server closed it, the client has not taken its octets.
func TestOrphanIsDestroyed(t *testing.T) {
	l := newLab(t)
	l.serve(t, labServer4, func(c *net.TCPConn) { _, _ = io.WriteString(c, "last words") })
	newTap(t, l.open(t), func(p caught) Verdict {
		if p.Dir == Outbound && len(p.Seg.Payload) > 0 || p.Seg.Flags.Has(RST) {
			return Drop
		}
		return Accept
	})
	l.install(t, labServer4)
	c := l.dial(t, labServer4)
	orphans := func() (n int) {
		all, err := Sockets(l.server, []netip.Addr{labServer4}, []uint16{labPort})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			if s.State == TCPFinWait1 && s.Inode == 0 && s.WriteQueue > 0 {
				n++
			}
		}
		return n
	}
	eventually(t, "an orphan", func() bool { return orphans() == 1 })
	if n, err := DestroySockets(l.server, []netip.Addr{labServer4}, []uint16{labPort}); err != nil || n != 1 {
		t.Errorf("destroyed %d, %v", n, err)
	}
	if n := orphans(); n != 0 {
		t.Errorf("%d orphans left", n)
	}
	silent(t, c)
}
