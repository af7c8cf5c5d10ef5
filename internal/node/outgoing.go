package node

import (
	"github.com/ftckpt/ftckpt/checkpoint"
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
