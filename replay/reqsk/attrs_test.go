package reqsk

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

var (
	tuple4 = stream.FourTuple{Server: netip.MustParseAddrPort("10.0.0.1:80"), Client: netip.MustParseAddrPort("10.0.0.2:4242")}
	tuple6 = stream.FourTuple{Server: netip.MustParseAddrPort("[fd00::1]:80"), Client: netip.MustParseAddrPort("[fd00::2]:4242")}

	mss1460 = []byte{2, 4, 5, 180}
	mss500  = []byte{2, 4, 1, 244}
	mss1000 = []byte{2, 4, 3, 232}
	sackOK  = []byte{4, 2}
	wscale7 = []byte{1, 3, 3, 7}
	wscale9 = []byte{1, 3, 3, 9}
	ts      = []byte{8, 10, 0, 0, 0, 1, 0, 0, 0, 2}
	md5     = append([]byte{19, 18}, make([]byte, 16)...)
	mptcp   = []byte{30, 4, 0, 1}
)

func opts(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

func TestAttrsFrom(t *testing.T) {
	base := Attrs{ClientISN: 100, ServerISN: 200, MSS: 1460}
	with := func(f func(*Attrs)) *Attrs { a := base; f(&a); return &a }
	for name, tc := range map[string]struct {
		tuple       stream.FourTuple
		syn, synack []byte
		want        *Attrs // nil: an error
		unsuitable  bool
	}{
		"everything": {tuple4, opts(mss1460, sackOK, ts, wscale7), opts(mss1460, sackOK, ts, wscale9), with(func(a *Attrs) {
			a.SACKOK, a.TSOK, a.WScaleOK = true, true, true
			a.SndWScale, a.RcvWScale, a.ClientTSVal, a.ServerTSVal = 7, 9, 11, 22
		}), false},
		"what one side alone offers does not count": {tuple4, opts(mss1460, sackOK, ts, wscale7), mss1460, &base, false},
		"nor the other":              {tuple4, mss1460, opts(mss1460, sackOK, ts, wscale9), &base, false},
		"mss is the client's":        {tuple4, mss1460, mss1000, &base, false},
		"no mss, IPv4":               {tuple4, nil, nil, with(func(a *Attrs) { a.MSS = 536 }), false},
		"no mss, IPv6":               {tuple6, nil, nil, with(func(a *Attrs) { a.MSS = 1220 }), false},
		"mss too small, IPv4":        {tuple4, mss500, mss1460, nil, true},
		"mss enough for IPv4":        {tuple4, mss1000, mss1460, with(func(a *Attrs) { a.MSS = 1000 }), false},
		"mss too small, IPv6":        {tuple6, mss1000, mss1460, nil, true},
		"mptcp asked for, not given": {tuple4, opts(mss1460, mptcp), mss1460, &base, false},
		"mptcp":                      {tuple4, opts(mss1460, mptcp), opts(mss1460, mptcp), nil, true},
		"md5":                        {tuple4, opts(mss1460, md5), opts(mss1460, md5), nil, true},
		"what is after the end":      {tuple4, mss1460, opts(mss1460, []byte{0}, mptcp), &base, false},
		"broken option":              {tuple4, opts(mss1460, []byte{4}), opts(mss1460, []byte{30, 99}), &base, false},
		"too many options":           {tuple4, make([]byte, 41), nil, nil, false},
		"no addresses":               {stream.FourTuple{}, mss1460, mss1460, nil, false},
		"mixed families":             {stream.FourTuple{Server: tuple4.Server, Client: tuple6.Client}, mss1460, mss1460, nil, false},
		"link-local": {stream.FourTuple{Server: tuple6.Server, Client: netip.MustParseAddrPort("[fe80::1]:1")},
			mss1460, mss1460, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := AttrsFrom(stream.ConnOpen{Conn: 7, Tuple: tc.tuple, ISN: 100, Options: tc.syn},
				stream.ConnAccept{Conn: 7, ISN: 200, Options: tc.synack}, 11, 22)
			if tc.want == nil {
				if err == nil || errors.Is(err, ErrUnsuitable) != tc.unsuitable {
					t.Fatalf("%+v, %v", got, err)
				}
				return
			}
			if d := cmp.Diff(*tc.want, got); err != nil || d != "" {
				t.Fatalf("%v\n%s", err, d)
			}
		})
	}
	if _, err := AttrsFrom(stream.ConnOpen{Conn: 1, Tuple: tuple4}, stream.ConnAccept{Conn: 2}, 0, 0); err == nil {
		t.Error("SYN and SYN-ACK of two connections, and no error")
	}
}

func FuzzAttrsFrom(f *testing.F) {
	f.Add(opts(mss1460, sackOK, ts, wscale7), opts(mss1460, sackOK, ts, wscale9))
	f.Add(opts(mss1460, mptcp), []byte{30, 1})
	f.Fuzz(func(t *testing.T, syn, synack []byte) {
		a, err := AttrsFrom(stream.ConnOpen{Tuple: tuple4, Options: syn}, stream.ConnAccept{Options: synack}, 1, 2)
		if err == nil && (a.MSS < minMSS4 || a.SndWScale > 14 || a.RcvWScale > 14) {
			t.Fatalf("%+v: the kernel would refuse it", a)
		}
	})
}

func TestACK(t *testing.T) {
	const isn = ^seqnum.Value(0) - 5 // the window wraps
	for name, tc := range map[string]struct {
		shift uint8
		on    bool
		edge  seqnum.Value
		want  uint16
	}{
		"unscaled":                       {0, false, isn.Add(1 + 4000), 4000},
		"a shift without window scaling": {7, false, isn.Add(1 + 4000), 4000},
		"scaled, rounded down":           {7, true, isn.Add(1 + 4000), 31},
		"scaled, not to nothing":         {7, true, isn.Add(1 + 100), 1},
		"scaled, no rounding":            {7, true, isn.Add(1 + 128), 1},
		"more than the field holds":      {2, true, isn.Add(1 + 1<<20), 65535},
		"shut":                           {7, true, isn.Add(1), 0},
		"an edge behind the first octet": {7, true, isn, 0},
	} {
		a := Attrs{ClientISN: 9, ServerISN: isn, SndWScale: tc.shift, WScaleOK: tc.on, TSOK: true, ClientTSVal: 3, ServerTSVal: 4}
		want := tcpwrap.Outgoing{Up: true, Tuple: tuple4, Seq: 10, Ack: isn.Add(1), Flags: tcpwrap.ACK, Window: tc.want,
			HasTS: true, TSVal: 3, TSEcr: 4}
		got := a.ACK(tuple4, tc.edge)
		if got.Window != want.Window || got.Seq != want.Seq || got.Ack != want.Ack || got.Flags != want.Flags ||
			!got.Up || got.Tuple != want.Tuple || got.TSVal != 3 || got.TSEcr != 4 || !got.HasTS || got.Payload != nil {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}
