package reqsk

import (
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// TestTakeover moves a conversation between real TCPs from one server to
// another: the client's is an ordinary one throughout.
func TestTakeover(t *testing.T) {
	for _, tc := range []struct {
		name           string
		v6             bool
		network        string // of the new server's listener
		client         map[string]string
		oldOne, newOne map[string]string
		linger         time.Duration
	}{
		{name: "ipv4"},
		{name: "ipv6", v6: true},
		{name: "ipv4 to a listener of both families", network: "tcp"},
		{name: "ipv6 to a listener of both families", network: "tcp", v6: true},
		{name: "no timestamps", client: map[string]string{"net/ipv4/tcp_timestamps": "0"}},
		{name: "no window scaling", client: map[string]string{"net/ipv4/tcp_window_scaling": "0"}},
		{name: "an ACK that is late", linger: 3 * clockSlack * time.Millisecond},
		{name: "no sack", client: map[string]string{"net/ipv4/tcp_sack": "0"}},
		{name: "nothing at all", v6: true, client: map[string]string{
			"net/ipv4/tcp_timestamps": "0", "net/ipv4/tcp_window_scaling": "0", "net/ipv4/tcp_sack": "0"}},
		{name: "small buffers there", newOne: map[string]string{"net/ipv4/tcp_rmem": "4096 16384 65536", "net/ipv4/tcp_wmem": "4096 16384 65536"}},
		{name: "small buffers here", oldOne: map[string]string{"net/ipv4/tcp_rmem": "4096 16384 65536"}},
		{name: "large buffers there", newOne: map[string]string{"net/ipv4/tcp_rmem": "4096 131072 268435456"}},
		{name: "all switched off there", newOne: map[string]string{
			"net/ipv4/tcp_syncookies": "0", "net/ipv4/tcp_timestamps": "0",
			"net/ipv4/tcp_window_scaling": "0", "net/ipv4/tcp_sack": "0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, tc.v6)
			for ns, m := range map[string]map[string]string{l.client: tc.client, l.old: tc.oldOne, l.new: tc.newOne} {
				for name, value := range m {
					sysctl(t, ns, name, value)
				}
			}
			network := tc.network
			if network == "" {
				network = map[bool]string{false: "tcp4", true: "tcp6"}[tc.v6]
			}
			first := server(t, l.listen(t, l.old, network, 0))
			k := l.dial(t)
			for _, n := range []int{1, 500, 3000} {
				k.talk(t, n)
			}
			before := l.wire.settled(t, k)
			was := inspect(t, first.conn(k))

			g := l.gate(t) // the rules first: no reset
			g.linger = tc.linger
			l.cut(t)
			k.say(t, 2000) // into the void: the client will send it again
			ln := l.listen(t, l.new, network, 0)
			r := l.recreator(t)
			runtime.GC() // a link that nothing holds would be detached now
			runtime.GC()
			g.recreate(t, r, k, &before)
			second := server(t, ln)
			g.replay(t, k, &before)

			if is := inspect(t, second.conn(k)); is != was {
				t.Errorf("new socket %+v, old one %+v", is, was)
			}
			l.wire.mark(k.tuple)
			g.goLive(t)
			k.hear(t)
			k.talk(t, 1<<20)
			after := l.wire.settled(t, k)

			if len(after.fromNew) == 0 || after.fromNew[0] != before.serverNxt {
				t.Errorf("first data of the new server at %v, want %v", after.fromNew[:min(3, len(after.fromNew))], before.serverNxt)
			}
			if after.resets > 0 || g.resets > 0 {
				t.Errorf("%d resets seen by the client, %d kept from it", after.resets, g.resets)
			}
			if before.serverTSAt != (time.Time{}) && before.serverTS != 0 {
				checkClock(t, before, after)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			for name, value := range tc.newOne {
				if got := readSysctl(t, l.new, name); got != value && len(value) == 1 {
					t.Errorf("%s = %s after Close, was %s", name, got, value)
				}
			}
			k.talk(t, 100<<10) // the connection does not depend on the program or the settings
		})
	}
}

// clockSlack is how far, in ms, the time at which a test sees a packet may be
// from the time at which it was sent.
const clockSlack = 100

// checkClock wants the server's timestamps to go on as if nothing had been.
func checkClock(t *testing.T, before, after seen) {
	t.Helper()
	if after.backward > 0 {
		t.Errorf("%d timestamps of the server went backward", after.backward)
	}
	first := after.tsNew[0]
	passed := uint32(first.at.Sub(before.serverTSAt).Milliseconds())
	if off := int32(first.val - before.serverTS - passed); off < -clockSlack || off > clockSlack {
		t.Errorf("the server's clock is off by %d ms after %d ms", off, passed)
	}
}

// TestOrder wants connections to be accepted in the order of their ACKs, which
// is not the order in which they began, and all to go on.
func TestOrder(t *testing.T) {
	l := newLab(t, false)
	server(t, l.listen(t, l.old, "tcp4", 0))
	const n = 40
	var ks []*talker
	for range n {
		k := l.dial(t)
		k.talk(t, 100)
		ks = append(ks, k)
	}
	var cs []seen
	for _, k := range ks {
		cs = append(cs, l.wire.settled(t, k))
	}
	g := l.gate(t)
	l.cut(t)
	ln := l.listen(t, l.new, "tcp4", 0)
	r := l.recreator(t)
	begin := time.Now()
	for i := range ks {
		j := (i*7 + 3) % n
		g.recreate(t, r, ks[j], &cs[j])
	}
	t.Logf("%d connections re-created in %v", n, time.Since(begin))
	if got, err := r.Counts(); err != nil || got != (Counts{Assigned: n}) {
		t.Errorf("%+v (%v)", got, err)
	}
	socks, err := tcpwrap.Sockets(l.new, []netip.Addr{l.vip}, []uint16{labPort})
	if err != nil {
		t.Fatal(err)
	}
	inQueue := 0
	for _, s := range socks {
		if s.State == tcpwrap.TCPListen {
			inQueue = int(s.ReadQueue)
		}
	}
	if inQueue != n || len(socks) != n+1 {
		t.Errorf("%d sockets, %d in the accept queue; want %d and %d", len(socks), inQueue, n+1, n)
	}
	for i := range ks {
		j := (i*7 + 3) % n
		c := accept(t, ln)
		if got := c.RemoteAddr().String(); got != ks[j].tuple.Client.String() {
			t.Fatalf("accepted as number %d: %s, want %v", i, got, ks[j].tuple.Client)
		}
		// What it was sent so far, and then an answer to it.
		g.mu.Lock()
		w := g.swall[ks[j].tuple]
		err := g.inject(ks[j].tuple, w, w.a.ClientISN.Add(1), ks[j].sent)
		g.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(ks[j].sent))
		c.SetDeadline(time.Now().Add(deadline))
		for at := 0; at < len(buf); {
			m, err := c.Read(buf[at:])
			if err != nil {
				t.Fatal(err)
			}
			at += m
		}
		answer(buf, 0)
		if _, err := c.Write(buf); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		eventually(t, "the answer", func() bool {
			g.mu.Lock()
			defer g.mu.Unlock()
			return w.kNxt == w.a.ServerISN.Add(seqnum.Size(1+len(buf)))
		})
		if _, err := c.Write([]byte{byte(j)}); err != nil { // news
			t.Fatal(err)
		}
	}
	g.goLive(t)
	for j, k := range ks {
		k.SetReadDeadline(time.Now().Add(deadline))
		var b [2]byte
		if m, err := k.Read(b[:]); m != 1 || b[0] != byte(j) {
			t.Fatalf("connection %d got %v (%v)", j, b[:m], err)
		}
	}
	if g.resets > 0 {
		t.Errorf("%d resets", g.resets)
	}
}
