package node

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/remote"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// dialling finds the dials that are under way in an image, and the first record
// that a recovery needs for them.
func dialling(m *tcpwrap.Machine, svc service, socks []checkpoint.Socket) (ids []stream.ConnID, from stream.Position) {
	there := map[stream.FourTuple]bool{}
	for _, s := range socks {
		if s.State == checkpoint.SynSent && svc.dialled(s.Tuple) {
			there[s.Tuple] = true
		}
	}
	from = m.Next()
	for _, d := range m.Dialling(func(t stream.FourTuple) bool { return there[t] }) {
		ids = append(ids, d.Conn)
		from = min(from, d.Open)
	}
	return ids, from
}

// leftBehind are the connections of an image, apart from the service's own, that
// no recovery brings back: the server opened them from another address or to
// peers that were not named, or clients came by another way. Those between
// sockets of the image itself are not among them.
func leftBehind(svc service, socks []checkpoint.Socket) []checkpoint.Socket {
	there := map[stream.FourTuple]bool{}
	for _, s := range socks {
		there[s.Tuple] = true
	}
	var out []checkpoint.Socket
	for _, s := range socks {
		switch {
		case !s.Stream || s.State == checkpoint.Listen || s.State == checkpoint.Closed || carried(svc, s) || svc.at(s.Tuple.Server):
		case s.Tuple.Server.Addr().IsLoopback(), svc.dialled(s.Tuple): // the latter: not answered yet
		case there[stream.FourTuple{Server: s.Tuple.Client, Client: s.Tuple.Server}]:
		default:
			out = append(out, s)
		}
	}
	return out
}

// lend makes the addresses of such connections local to the capsule, for as long as it
// takes to restore and end them.
func (r *recovery) lend(gone []checkpoint.Socket) (giveBack func() error, err error) {
	var addrs []netip.Addr
	seen := map[netip.Addr]bool{}
	for _, a := range r.svc.addrs() {
		seen[a] = true
	}
	for _, s := range gone {
		if a := s.Tuple.Server.Addr(); !seen[a] {
			seen[a] = true
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return func() error { return nil }, nil
	}
	return r.capsule.Lend(addrs)
}

// reset ends restored connections that lead nowhere from this host, before the
// server runs: it sees what it would see if its peers had reset them, and may
// dial again. Were they left alone it would wait for answers that never come.
func (r *recovery) reset(gone []checkpoint.Socket) error {
	tuples := map[stream.FourTuple]bool{}
	for _, s := range gone {
		r.drv.send(&tcpwrap.Outgoing{Up: true, Tuple: s.Tuple, Seq: s.RcvNxt, Ack: s.SndNxt, Flags: tcpwrap.RST | tcpwrap.ACK})
		tuples[s.Tuple] = true
		r.log.Warn("connection of the server reset: it was not protected", "conn", s.Tuple, "why", unprotectedWhy(r.svc, s.Tuple))
	}
	// One whose peer spoke meanwhile expects another octet.
	if _, err := tcpwrap.DestroyConnections(r.capsule.NetNS(), tuples); err != nil {
		return fmt.Errorf("end connections that were not protected: %w", err)
	}
	return nil
}

// unprotectedWhy says what to do about a connection that no recovery brings
// back.
func unprotectedWhy(svc service, t stream.FourTuple) string {
	peer := remote.Host(t.Client)
	vips := svc.addrs()
	i := slices.IndexFunc(vips, func(a netip.Addr) bool { return a.Is4() == t.Client.Addr().Is4() })
	switch named := remote.Any(svc.Outgoing, t.Client); {
	case slices.Contains(vips, t.Server.Addr()):
		return fmt.Sprintf("protect with --outgoing %s", peer)
	case i < 0:
		return fmt.Sprintf("give the service an address of the family of %v, and have the server open it from there", t.Client.Addr())
	default:
		move := fmt.Sprintf("have the server open it from %s (bind it there, or: ip route replace %s ... src %s)", vips[i], peer.Net, vips[i])
		if !named {
			move += fmt.Sprintf(", and protect with --outgoing %s", peer)
		}
		return move
	}
}

// maxUnprotected bounds what is told of connections that are not protected.
const maxUnprotected = 32

// outgoing says how the connections of an image stand that the server opened.
// Those whose local port it listens on are clients', who came by another way.
func outgoing(svc service, socks []checkpoint.Socket) control.Outgoing {
	heard := map[uint16]bool{}
	for _, s := range socks {
		if s.Listening() {
			heard[s.Tuple.Server.Port()] = true
		}
	}
	out := control.Outgoing{Peers: []string{}, Unprotected: []control.Unprotected{}}
	for _, r := range svc.Outgoing {
		out.Peers = append(out.Peers, r.String())
	}
	for _, s := range socks {
		if carried(svc, s) && svc.dialled(s.Tuple) {
			out.Connections++
		}
	}
	for _, s := range leftBehind(svc, socks) {
		if heard[s.Tuple.Server.Port()] {
			continue
		}
		out.Others++
		if len(out.Unprotected) < maxUnprotected {
			out.Unprotected = append(out.Unprotected, control.Unprotected{
				Local: s.Tuple.Server.String(), Remote: s.Tuple.Client.String(), Remedy: unprotectedWhy(svc, s.Tuple),
			})
		}
	}
	return out
}

// tellOutgoing warns of the connections that no recovery brings back, once for
// each way they go.
func (p *primary) tellOutgoing(now control.Outgoing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outgoing = nil
	if now.Connections+now.Others+len(now.Peers) > 0 {
		p.outgoing = &now
	}
	for _, u := range now.Unprotected {
		if p.warned[u.Remedy] || len(p.warned) >= maxUnprotected {
			continue
		}
		p.warned[u.Remedy] = true
		p.log.Warn("a connection that the server opened is not protected: a takeover resets it", "local", u.Local, "remote", u.Remote, "to_do", u.Remedy)
	}
}

// checkOutgoing refuses peers among which the log is: its packets would wait to
// be stable themselves.
func checkOutgoing(ctx context.Context, cfg config.Protect) error {
	if len(cfg.Outgoing) == 0 {
		return nil
	}
	c, _, err := logConfig(cfg.Name, cfg.Join, cfg.Log)
	if err != nil {
		return err
	}
	addrs := strings.Split(c.URL, ",")
	if cfg.Join != "" {
		j, err := stream.ParseJoin(cfg.Join)
		if err != nil {
			return exitcode.Wrap(exitcode.Config, err)
		}
		addrs = []string{j.Addr}
	}
	for _, a := range addrs {
		_, rest, found := strings.Cut(a, "://")
		if !found {
			rest = a
		}
		host, port, err := net.SplitHostPort(rest)
		if err != nil {
			host, port = strings.Trim(rest, "[]"), "4222" // what nats.go takes
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			continue // whoever dials it says so
		}
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			return fmt.Errorf("look up the log's host %s: %w", host, err)
		}
		for _, ip := range ips {
			if at := netip.AddrPortFrom(ip.Unmap(), uint16(n)); remote.Any(cfg.Outgoing, at) {
				return exitcode.Errorf(exitcode.Config, "outgoing: the log at %s is among %v: its packets would wait for themselves; give the peers' ports, or narrower networks", at, cfg.Outgoing)
			}
		}
	}
	return nil
}

// redials are the connections that the restored server will dial again. The
// caller holds mu.
func (r *recovery) redials(sth south, now time.Time) []replay.Redial {
	under := map[stream.ConnID]bool{}
	for _, id := range sth.Dialling {
		under[id] = true
	}
	ds := r.ledger.Redials(r.loc.gen.Cut, under, now, func(ts uint32, seen time.Time) uint32 {
		return ts + uint32(now.Sub(seen).Milliseconds()) + clockMargin
	})
	for _, d := range ds {
		r.newborn = append(r.newborn, d.Dial.Tuple)
		r.dialled = append(r.dialled, d.Dial.Tuple.Server.Port())
	}
	return ds
}

// movePort notes a connection of the image whose peer knows it by another port
// than TCP does. All its other numbers are restored as the peer knows them
// (patchTranslated).
func (r *recovery) movePort(s checkpoint.Socket, t tcpwrap.Translation) {
	if t.Port.Wire != t.Port.TCP {
		r.moved = append(r.moved, tcpwrap.Translated{Tuple: t.Tuple(s.Tuple), Translation: tcpwrap.Translation{Port: t.Port}})
	}
}

// reservePorts keeps the capsule's TCP from choosing ports by which peers know
// connections that have another one here.
func (r *recovery) reservePorts() error {
	ports := slices.Clone(r.dialled)
	for _, t := range r.moved {
		ports = append(ports, t.Tuple.Server.Port())
	}
	if len(ports) == 0 {
		return nil
	}
	return r.capsule.ReservePorts(ports)
}
