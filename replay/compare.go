package replay

import (
	"fmt"

	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// compareWith says what the old server is known to have said. A digest with
// another base is of another generation and proves nothing here.
func (l *line) compareWith(digests []stream.OutDigest) {
	for _, d := range digests {
		if d.Base == l.cut.SndNxt {
			l.said = append(l.said, d)
		}
	}
	l.out.Begin(l.cut.SndNxt)
}

// compare takes what the restored server says. Where it said something else
// before, this connection's recovery is not exact: its client may have the old
// octets, and would take the new ones for what follows them (promise 4).
func (e *Engine) compare(l *line, s *tcpwrap.Segment) {
	for len(l.said) > 0 && l.gap == "" && l.out.WriteUpTo(l.said[0].Seq, s.Seq, s.Payload) {
		if l.out.Sum() != l.said[0].Sum {
			e.stats.Divergences++
			l.gap = fmt.Sprintf("the restored server does not say what the old one said: they differ within the %d octets from %d on",
				l.cut.SndNxt.To(l.said[0].Seq), l.cut.SndNxt)
		}
		l.said = l.said[1:]
	}
}
