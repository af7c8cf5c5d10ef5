package tcpwrap_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// exchange is one request and its reply: data in, an acknowledgement with data
// out, and the log's notice.
func exchange(m *tcpwrap.Machine, now time.Time, in, out *tcpwrap.Segment) {
	m.Packet(now, 1, in, false)
	m.Ready.Reset()
	m.Packet(now, 2, out, false)
	m.Ready.Reset()
	m.Stable(now, m.Next()-1)
	m.Ready.Reset()
	in.Seq = in.Seq.Add(seqnum.Size(len(in.Payload)))
	in.Ack = in.Ack.Add(seqnum.Size(len(out.Payload)))
	out.Seq, out.Ack = in.Ack, in.Seq.Add(seqnum.Size(len(in.Payload)))
}

func exchanger(payload int) (m *tcpwrap.Machine, in, out *tcpwrap.Segment) {
	m = tcpwrap.NewMachine(1, 1, tcpwrap.DefaultLimits())
	tuple := tupleOf("A")
	m.Freeze()
	m.Adopt([]tcpwrap.Cut{{Tuple: tuple, RcvNxt: 1000, SndUna: 5000, SndNxt: 5000}})
	m.Thaw(time.Time{})
	in = &tcpwrap.Segment{Dir: tcpwrap.Inbound, Tuple: tuple, Seq: 1000, Ack: 5000, Flags: tcpwrap.ACK, Window: 1000, Payload: make([]byte, payload)}
	out = &tcpwrap.Segment{Dir: tcpwrap.Outbound, Tuple: tuple, Seq: 5000, Ack: seqnum.Value(1000 + payload), Flags: tcpwrap.ACK, Window: 1000, Payload: make([]byte, 5)}
	in.Options.WScale, out.Options.WScale = -1, -1
	return m, in, out
}

func BenchmarkMachineExchange(b *testing.B) {
	m, in, out := exchanger(100)
	now := time.Unix(1, 0)
	b.ReportAllocs()
	for b.Loop() {
		exchange(m, now, in, out)
	}
	if m.Stats().Violations > 0 || m.Stats().Held == 0 {
		b.Fatalf("%+v", m.Stats())
	}
}

// A thousand connections, and a log that lags by as many packets.
func BenchmarkMachineManyHeld(b *testing.B) {
	const conns = 1000
	m := tcpwrap.NewMachine(1, 1, tcpwrap.DefaultLimits())
	in, out := make([]tcpwrap.Segment, conns), make([]tcpwrap.Segment, conns)
	for i := range conns {
		_, si, so := exchanger(100)
		in[i], out[i] = *si, *so
		in[i].Tuple.Client = netip.AddrPortFrom(in[i].Tuple.Client.Addr(), uint16(10000+i))
		out[i].Tuple = in[i].Tuple
		m.Adopt([]tcpwrap.Cut{{Tuple: in[i].Tuple, RcvNxt: 1000, SndUna: 5000, SndNxt: 5000}})
	}
	now := time.Unix(1, 0)
	b.ReportAllocs()
	for b.Loop() {
		for i := range in {
			m.Packet(now, 1, &in[i], false)
			m.Packet(now, 2, &out[i], false)
			in[i].Seq = in[i].Seq.Add(100)
			out[i].Ack = in[i].Seq.Add(100)
			m.Ready.Reset()
		}
		m.Stable(now, m.Next()-1)
		m.Ready.Reset()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/conns, "ns/exchange")
}

// One packet pair costs at most two allocations: the record's box is one.
func TestMachineAllocatesLittle(t *testing.T) {
	m, in, out := exchanger(100)
	now := time.Unix(1, 0)
	for range 1000 { // so that its slices have grown
		exchange(m, now, in, out)
	}
	if n := testing.AllocsPerRun(1000, func() { exchange(m, now, in, out) }); n > 2 {
		t.Errorf("%v allocations for a request and its reply, want at most 2", n)
	}
}
