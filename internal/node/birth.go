package node

import (
	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/replay/reqsk"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// openRecreator prepares the capsule for connections that are younger than the
// generation. Without it (kernel before 6.9) they end with a reset.
func (s *standby) openRecreator() {
	r, err := reqsk.Open(s.capsule.NetNS())
	if err != nil {
		s.log.Warn("connections younger than the newest generation will be reset at a takeover: this kernel cannot re-create them", "err", err)
		return
	}
	s.recreate = r
}

// bear re-creates a connection in the restored TCP. The driver calls it with
// its lock held, before what is to be injected into that connection.
func (r *recovery) bear(b *replay.Birth) {
	t := b.Open.Tuple
	a, err := reqsk.AttrsFrom(b.Open, b.Accept, b.ClientTS, b.ServerTS)
	if err == nil {
		err = r.recreate.Want(t, a)
	}
	if err != nil {
		r.log.Error("connection reset: it cannot be re-created", "conn", t, "err", err)
		r.clock.t.Resets++
		r.engine.Stillborn(t)
		return
	}
	ack := a.ACK(t, b.Edge)
	r.drv.send(&ack)
}

// unaccepted finds, of the protected connections that an image does not have,
// those that wait in the accept queue: their sockets belong to nobody yet, and
// unlike those the server has closed they are not closing.
func unaccepted(netns string, svc service, missing []tcpwrap.Missing) (ids []stream.ConnID, from stream.Position, err error) {
	if len(missing) == 0 {
		return nil, 0, nil
	}
	socks, err := tcpwrap.Sockets(netns, svc.addrs(), svc.Ports)
	if err != nil {
		return nil, 0, err
	}
	waits := map[stream.FourTuple]bool{}
	for _, s := range socks {
		if s.Inode != 0 {
			continue
		}
		switch checkpoint.TCPState(s.State) {
		case checkpoint.Established, checkpoint.CloseWait, checkpoint.SynRecv, newSynRecv:
			waits[stream.FourTuple{Server: s.Local, Client: s.Remote}] = true
		}
	}
	for _, m := range missing {
		if waits[m.Tuple] {
			ids = append(ids, m.Conn)
			if from == 0 || m.Open < from {
				from = m.Open
			}
		}
	}
	return ids, from, nil
}

// newSynRecv is the kernel's state of a request socket (TCP_NEW_SYN_RECV).
const newSynRecv = checkpoint.TCPState(12)

// closeRecreator lets go of the BPF program.
func (s *standby) closeRecreator() {
	if s.recreate == nil {
		return
	}
	if err := s.recreate.Close(); err != nil {
		s.log.Debug("close the BPF program", "err", err)
	}
	s.recreate = nil
}
