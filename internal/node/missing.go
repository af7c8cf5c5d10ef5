package node

import (
	"context"
	"time"

	"github.com/ftckpt/ftckpt/replay/closing"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// absent are the protected connections that an image does not have, by what has
// become of them.
type absent struct {
	unaccepted []stream.ConnID // wait in the accept queue
	from       stream.Position // first record that a recovery needs for these; 0: none
	closing    []tcpwrap.Cut   // closed by the server, and TCP is not done with the client
	gone       []stream.FourTuple
}

// classify asks the kernel what has become of connections that an image does not
// have: their sockets belong to nobody, not yet or not any more.
func classify(netns string, svc service, missing []tcpwrap.Missing, translated func(stream.FourTuple) (tcpwrap.Translation, bool)) (a absent, err error) {
	if len(missing) == 0 {
		return a, nil
	}
	socks, err := tcpwrap.Sockets(netns, svc.addrs(), svc.Ports)
	if err != nil {
		return a, err
	}
	states := make(map[stream.FourTuple]tcpwrap.Socket, len(socks))
	for _, s := range socks {
		at := stream.FourTuple{Server: s.Local, Client: s.Remote}
		if t, yes := translated(at); yes {
			at = t.Tuple(at)
		}
		states[at] = s
	}
	for _, m := range missing {
		if !svc.serves(m.Tuple) {
			continue
		}
		s, there := states[m.Tuple]
		switch {
		case !there:
			if !m.Embryonic {
				a.gone = append(a.gone, m.Tuple)
			}
		case s.Inode != 0: // somebody has it: it is too young for the image, or older than it
		case s.State == tcpwrap.TCPEstablished || s.State == tcpwrap.TCPCloseWait || s.State == tcpwrap.TCPSynRecv || s.State == tcpwrap.TCPNewSynRecv:
			if m.Open == 0 {
				continue
			}
			a.unaccepted = append(a.unaccepted, m.Conn)
			if a.from == 0 || m.Open < a.from {
				a.from = m.Open
			}
		case orphan(&s) && m.Closing:
			a.closing = append(a.closing, m.Cut)
		}
	}
	return a, nil
}

// orphan reports whether a server has closed a socket with which TCP is not
// done: nobody has it, and no image will.
func orphan(s *tcpwrap.Socket) bool {
	if s.Inode != 0 {
		return false
	}
	switch s.State {
	case tcpwrap.TCPFinWait1, tcpwrap.TCPFinWait2, tcpwrap.TCPLastAck, tcpwrap.TCPClosing, tcpwrap.TCPTimeWait:
		return true
	}
	return false
}

const (
	// owingTime is how long a generation waits for clients to take what a server
	// has left behind when it closed: those octets are in TCP alone.
	owingTime  = 3 * time.Second
	owingEvery = 20 * time.Millisecond
)

// awaitOwing waits until TCP owes clients of closed connections nothing but the
// FIN, or for owingTime: a takeover from the generation could not bring them the
// rest.
func (p *primary) awaitOwing(ctx context.Context) error {
	for end := time.Now().Add(owingTime); ; sleep(ctx, owingEvery) {
		socks, err := tcpwrap.Sockets(p.where.netns, p.svc.addrs(), p.svc.Ports)
		if err != nil {
			return err
		}
		owing := 0
		for i := range socks {
			if orphan(&socks[i]) && socks[i].WriteQueue > 1 { // the FIN counts as one
				owing++
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case owing == 0:
			return nil
		case time.Now().After(end):
			p.log.Warn("the server has closed connections with output that their clients do not take: a takeover from this generation resets them", "connections", owing)
			return nil
		}
	}
}

// revive makes TCP again what it had of a connection that the server closed
// before the generation.
func (r *recovery) revive() {
	for _, c := range r.closing {
		if err := closing.Revive(r.capsule.NetNS(), c); err != nil {
			r.log.Error("connection reset: its end cannot be re-created", "conn", c.Tuple, "err", err)
			r.clock.t.Resets++
			r.drv.with(func() { r.engine.Lost(c.Tuple) })
		}
	}
}
