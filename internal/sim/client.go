package sim

import (
	"bytes"
	"net/netip"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
	"github.com/ftckpt/ftckpt/tcpwrap/tcptest"
)

const (
	firstPort  = 40000
	maxClients = 5
	mostSaid   = 700 // octets of one client
)

var (
	vip    = netip.MustParseAddrPort("198.51.100.1:80")
	tuples = func() (t [maxClients]stream.FourTuple) {
		for i := range t {
			t[i] = stream.FourTuple{Server: vip, Client: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(firstPort+i))}
		}
		return t
	}()
)

// client is a real client: it must not notice a thing.
type client struct {
	name  int
	ep    *tcptest.Endpoint
	said  int
	app   tcptest.App // what a server that never fails would be by now
	want  []byte      // and would have said
	heard int
	ended bool // want has the last word
	gone  bool // it has reset the connection
	told  bool // the service has reset it, and said so
}

func (w *World) clientOf(t stream.FourTuple) *client {
	return w.clients[int(t.Client.Port())-firstPort]
}

func (w *World) clock() uint32 { return uint32(w.now.UnixMilli()) }

func (w *World) config(name int, server bool) tcptest.Config {
	c := tcptest.Config{
		Tuple: tuples[name], Server: server,
		ISN:    seqnum.Value(uint32(w.d.next()) | uint32(w.d.n(2)*0xffffff00)), // half of them are about to wrap
		Buffer: w.d.between(60, 1500), Scale: uint8(w.d.n(4)),
		MSS: 120, TS: w.setup.Timestamps, Strict: w.setup.Strict, Clock: w.clockFn,
	}
	if server && w.setup.Overruns > 0 {
		c.Overrun = w.overrunFn
	}
	return c
}

func (w *World) dial() {
	c := &client{name: len(w.clients), app: tcptest.App{Name: len(w.clients)}}
	c.ep = tcptest.Dial(w.config(c.name, false))
	w.clients = append(w.clients, c)
	w.truth.facts = append(w.truth.facts, fact{})
	w.listen(c)
}

// over reports whether the client has no more use for its connection: a host
// that has nothing left to say does not carry TIME_WAIT over, so the last
// acknowledgement, when it was lost, is a reset then.
func (c *client) over() bool {
	return c.gone || c.told || c.ep.State == tcptest.Reset || c.finished()
}

func (c *client) finished() bool {
	return c.ep.Closed && c.ep.PeerClosed && c.ended && c.heard == len(c.want)
}

func (w *World) listen(c *client) {
	w.toServer = append(w.toServer, c.ep.Out...)
	c.ep.Out = c.ep.Out[:0:0]
	if c.ep.Closed && !c.ended {
		c.ended = true
		c.want = append(c.want, tcptest.Bye...)
	}
	if c.ep.Readable() > 0 {
		p := c.ep.Read(1 << 20)
		if c.heard+len(p) > len(c.want) || !bytes.Equal(p, c.want[c.heard:c.heard+len(p)]) {
			w.violate(4, "client %d heard wrong octets from number %d on", c.name, c.heard)
		}
		c.heard += len(p)
	}
	if c.ep.State == tcptest.Reset && !c.gone && !c.told && !c.finished() {
		w.violate(4, "client %d was reset, and nobody has said why", c.name)
	}
}

// act lets a client do something.
func (w *World) act(c *client) {
	size := w.d.between(1, 200)
	switch what := w.d.n(20); {
	case c.ep.State == tcptest.SynSent:
		if what < 8 {
			c.ep.Handshake()
		}
	case what < 10:
		if !c.ep.Closed && c.said < mostSaid {
			p := make([]byte, w.d.between(1, 200))
			tcptest.Says(p, c.name, c.said)
			c.said += len(p)
			c.want = c.app.AppendHears(c.want, p)
			c.ep.Write(p)
		}
		c.ep.Send(size)
	case what < 14:
		c.ep.Resend(size)
	case what < 16:
		c.ep.Ack()
	case what < 17:
		c.ep.Probe()
	case what < 18 && w.d.chance(3):
		c.ep.CloseWrite()
		c.ep.Send(size)
	case what < 19 && w.d.chance(20):
		c.gone = true
		c.ep.Abort()
	}
	w.listen(c)
}

// deliver takes a packet off a wire; a calm one neither loses nor reorders.
func (w *World) deliver(wire *[]tcpwrap.Segment, calm bool, to func(*tcpwrap.Segment)) {
	if len(*wire) == 0 {
		return
	}
	i := 0
	if !calm && w.d.chance(4) {
		i = w.d.n(len(*wire))
	}
	s := (*wire)[i]
	if calm || !w.d.chance(12) { // else it is there twice
		*wire = append((*wire)[:i], (*wire)[i+1:]...)
	}
	if calm || !w.d.chance(10) {
		to(&s)
	}
}

func (w *World) toClientNow(s *tcpwrap.Segment) {
	c := w.clientOf(s.Tuple)
	c.ep.Receive(s)
	w.listen(c)
}

// toServerNow brings a packet to the host that the address leads to, or, now and
// then, to another one that believes to have it.
func (w *World) toServerNow(s *tcpwrap.Segment) {
	n := w.nodes[w.route]
	if !w.calm && w.d.chance(6) {
		if o := w.nodes[w.d.n(len(w.nodes))]; o.vip {
			n = o
		}
	}
	if n.vip && n.runs() && !n.cutClients {
		n.catch(*s)
	}
}
