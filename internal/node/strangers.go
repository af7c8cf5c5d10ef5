package node

import (
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// strangers are the connections of an image that come from clients outside
// --client-net: nothing of them is in the log, so no recovery of them can be
// exact, and they end with a reset at both ends.
func strangers(svc service, socks []checkpoint.Socket) []checkpoint.Socket {
	var out []checkpoint.Socket
	for _, s := range socks {
		if connected(s) && svc.at(s.Tuple.Server) && !svc.serves(s.Tuple) {
			out = append(out, s)
		}
	}
	return out
}

// resetStrangers tells the restored server that they are gone, as their clients
// would: it reads ECONNRESET. Until the service is live the rules keep whatever
// its TCP says to those clients in here (Rules.InstallAlone).
func (r *recovery) resetStrangers() {
	all := strangers(r.svc, r.loc.socks)
	if len(all) == 0 {
		return
	}
	r.drv.with(func() {
		for _, s := range all {
			r.drv.send(&tcpwrap.Outgoing{Up: true, Tuple: s.Tuple, Seq: s.RcvNxt, Ack: s.SndUna, Flags: tcpwrap.RST | tcpwrap.ACK})
		}
	})
	r.log.Info("connections of clients outside --client-net end here", "connections", len(all))
}

// admitStrangers lets clients outside --client-net reach the service, unheld and
// unlogged, and asks those who were connected to the old primary where they
// stand: the answer meets no socket, and TCP resets them at exactly that place.
// Those of whom the image knows nothing learn it when they next speak.
func (r *recovery) admitStrangers() {
	if len(r.svc.Clients) == 0 {
		return
	}
	if err := r.rules.Install(); err != nil {
		r.log.Error("let clients outside --client-net in; they reach nothing until the next ftckpt standby", "err", err)
		return
	}
	// Ahead of what the clients have seen: what is older they pass over in silence.
	clock := uint32(time.Since(r.dumped).Milliseconds()) + clockMargin
	r.drv.with(func() {
		for _, s := range strangers(r.svc, r.loc.socks) {
			r.drv.send(&tcpwrap.Outgoing{
				Tuple: s.Tuple, Seq: s.SndUna.Sub(1), Ack: s.RcvNxt, Flags: tcpwrap.ACK,
				HasTS: s.Options&checkpoint.OptTimestamps != 0, TSVal: s.Timestamp + clock,
			})
		}
	})
}
