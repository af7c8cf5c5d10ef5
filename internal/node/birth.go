package node

import (
	"errors"
	"time"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/replay/reqsk"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// way is how connections that are younger than the generation are made again.
type way string

// The ways. wayBPF gives a connection its old numbers, and leaves those that it
// cannot do to wayTranslate when it was not asked for by name; wayTranslate goes
// through the handshake again and translates what TCP chooses this time.
const (
	wayBPF       way = "bpf"
	wayTranslate way = "translate"
	wayNone      way = "none" // they are reset
)

// openRecreator prepares the capsule for connections that are younger than the
// generation.
func (s *standby) openRecreator() {
	way := wayTranslate
	defer func() {
		s.mu.Lock()
		s.way = way
		s.mu.Unlock()
	}()
	if s.cfg.Recreate == config.RecreateNumbers {
		return
	}
	_, err := reqsk.Probe()
	var r *reqsk.Recreator
	if err == nil {
		r, err = reqsk.Open(s.capsule.NetNS())
	}
	switch {
	case err == nil:
		s.recreate, way = r, wayBPF
	case s.cfg.Recreate == config.RecreateBPF:
		way = wayNone
		s.log.Warn("connections younger than the newest generation will be reset at a takeover: this kernel cannot re-create them by BPF, and --recreate bpf allows nothing else", "err", err)
	default:
		s.log.Info("connections younger than the newest generation will have their numbers translated after a takeover: this kernel cannot re-create them by BPF", "err", err)
	}
}

// bear re-creates a connection in the restored TCP. The driver calls it with
// its lock held.
func (r *recovery) bear(b *replay.Birth) {
	_, translated := r.drv.dp.Get(b.Open.Tuple)
	err := reqsk.ErrUnsuitable
	if r.recreate != nil && (!b.Again || !translated) {
		if err = r.bearAsItWas(b); err == nil || b.Again {
			r.drv.dp.Forget(b.Open.Tuple)
			r.engine.Delivered(time.Now(), b.Open.Conn)
			return
		}
	}
	if r.way == wayTranslate || r.cfg.Recreate == config.RecreateAuto && leavesToOthers(err) {
		err = r.bearTranslated(b)
	}
	switch {
	case err == nil:
	case errors.Is(err, reqsk.ErrUnsuitable), errors.Is(err, tcpwrap.ErrUnsuitable):
		r.stillborn(b, err)
	default:
		r.log.Debug("re-create a connection; trying again", "conn", b.Open.Tuple, "err", err)
	}
}

// bearAsItWas gives a connection its old numbers.
func (r *recovery) bearAsItWas(b *replay.Birth) error {
	t := b.Open.Tuple
	a, err := reqsk.AttrsFrom(b.Open, b.Accept, b.ClientTS, b.ServerTS)
	if err != nil {
		return err
	}
	if err := r.recreate.Want(t, a); err != nil {
		return err
	}
	ack := a.ACK(t, b.Edge)
	r.drv.send(&ack)
	if err := r.recreate.Result(t); leavesToOthers(err) {
		return errors.Join(err, r.recreate.Forget(t))
	}
	return nil // what else may have gone wrong shows as silence, and is tried again
}

// leavesToOthers reports whether what BPF cannot do a handshake may: a client
// with a small MSS, addresses that a connection in TIME_WAIT still has, a listener
// that is MPTCP.
func leavesToOthers(err error) bool {
	return errors.Is(err, reqsk.ErrUnsuitable) || errors.Is(err, reqsk.ErrTaken) || errors.Is(err, reqsk.ErrRefused)
}

// bearTranslated goes through a connection's handshake again.
func (r *recovery) bearTranslated(b *replay.Birth) error {
	again, err := tcpwrap.RebirthFrom(b.Open, b.Accept, b.ClientTS, b.ServerTS, r.planned, b.Edge)
	if err != nil {
		return err
	}
	birth := *b
	return r.drv.dp.Recreate(again, func(err error) {
		r.drv.with(func() {
			switch {
			case r.drv.engine == nil:
			case err != nil:
				r.stillborn(&birth, err)
			default:
				r.engine.Delivered(time.Now(), birth.Open.Conn)
			}
		})
	})
}

// stillborn gives a connection up. The caller holds the driver's lock.
func (r *recovery) stillborn(b *replay.Birth, err error) {
	r.log.Error("connection reset: it cannot be re-created", "conn", b.Open.Tuple, "err", err)
	r.clock.t.Resets++
	r.drv.dp.Forget(b.Open.Tuple)
	r.engine.Stillborn(b.Open.Conn)
}

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
