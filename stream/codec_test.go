package stream

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

var update = flag.Bool("update", false, "write the golden files anew (a change of the wire format!)")

// equal compares records; addresses have unexported fields, and no octets are
// no octets, nil or not.
func equal(t interface {
	Helper()
	Fatalf(string, ...any)
}, want, got any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{}), cmp.Comparer(bytes.Equal)); d != "" {
		t.Fatalf("differs (-want +got):\n%s", d)
	}
}

func encodeBatch(t interface {
	Helper()
	Fatalf(string, ...any)
}, epoch Epoch, number uint64, first Position, recs ...Record) []byte {
	t.Helper()
	buf := make([]byte, batchHeader)
	var err error
	for _, r := range recs {
		if buf, err = AppendRecord(buf, r); err != nil {
			t.Fatalf("encode %T: %v", r, err)
		}
	}
	sealBatch(buf, header{epoch, number, first, uint32(len(recs))})
	return buf
}

// oneOfEach has every kind of record, with extreme values.
func oneOfEach() []Record {
	v4 := FourTuple{netip.MustParseAddrPort("10.0.0.1:6379"), netip.MustParseAddrPort("192.168.7.9:50000")}
	v6 := FourTuple{netip.MustParseAddrPort("[2001:db8::1]:443"), netip.MustParseAddrPort("[::ffff:1.2.3.4]:65535")}
	return []Record{
		Hello{Config: []byte(`{"service":"redis"}`)},
		Hello{},
		ConnOpen{Conn: 1, Tuple: v4, ISN: 0xfffffff0, Window: 64240, Options: []byte{2, 4, 5, 180}},
		ConnOpen{Conn: 1<<64 - 1, Tuple: v6, Options: bytes.Repeat([]byte{1}, MaxOptions)},
		ConnAccept{Conn: 1, ISN: 0x12345678, Options: []byte{2, 4, 5, 180, 1, 3, 3, 7}},
		Bytes{Conn: 1, Seq: 0xfffffff1, Payload: []byte("SET a 1\r\n")},
		Bytes{Conn: 2, Seq: 0},
		ConnState{Conn: 1, ClientAck: 1, ClientEdge: 65536, ServerNxt: 0xffffffff, ClientTS: 7, ServerTS: 8, ServerEdge: 9},
		ClientFin{Conn: 1, Seq: 9},
		ClientReset{Conn: 2, Seq: 10},
		ConnEnd{Conn: 1, Reason: EndClosed},
		ConnEnd{Conn: 2, Reason: EndQuarantine},
		Generation{ID: 3, Manifest: Sum([]byte("manifest")), Cut: 1 << 40, From: 1 << 39, FromSeq: 77},
		ServerExit{Status: 0x8b},
		Handover{Node: "node-b"},
		Handover{},
		Urgent{Conn: 3, Up: 0xfffffff9},
		Order{Upto: 1<<64 - 1, Takes: []Take{
			{Conn: 7, What: TakeAccept}, {Conn: 3, Seq: 0xfffffffe}, {Conn: 1<<61 - 1, Seq: 1}, {Conn: 0, What: TakeClosed},
		}},
		Order{Upto: 5},
	}
}

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		var lines []string
		for s := hex.EncodeToString(got); s != ""; {
			n := min(len(s), 64)
			lines, s = append(lines, s[:n]), s[n:]
		}
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want, err := hex.DecodeString(strings.ReplaceAll(string(raw), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	return want
}

func TestGoldenBatch(t *testing.T) {
	recs := oneOfEach()
	b := encodeBatch(t, 7, 42, 1001, recs...)
	want := golden(t, "batch-v1.hex", b)
	if !bytes.Equal(b, want) {
		t.Fatalf("the wire form has changed: logs that exist could not be read any more\n got %x\nwant %x", b, want)
	}
	got, err := DecodeBatch(want)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, Batch{Epoch: 7, Number: 42, First: 1001, Records: recs}, got)
	if got.Last() != 1001+Position(len(recs))-1 {
		t.Fatalf("last position %d", got.Last())
	}
}

func TestGoldenFenceAndBeat(t *testing.T) {
	f := Fence{Epoch: 3, Node: "host-b", At: time.UnixMicro(1_700_000_000_000_001), Prev: 12, Nonce: [16]byte{1, 2, 3, 15: 16}}
	b := encodeFence(f)
	want := golden(t, "fence-v1.hex", b)
	if !bytes.Equal(b, want) {
		t.Fatalf("the wire form of a fence has changed: %x, want %x", b, want)
	}
	got, err := decodeFence(want, 99)
	if err != nil {
		t.Fatal(err)
	}
	f.Seq = 99
	equal(t, f, got)

	b = appendBeat(nil, 0xdeadbeef, 5, []byte("pos=7"))
	want = golden(t, "beat-v1.hex", b)
	if !bytes.Equal(b, want) {
		t.Fatalf("the wire form of a heartbeat has changed: %x, want %x", b, want)
	}
	at := time.Unix(1, 0)
	beat, err := decodeBeat("ftckpt.a.beat.", "ftckpt.a.beat.primary.host-a", want, at)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, Beat{Role: "primary", Node: "host-a", Run: 0xdeadbeef, N: 5, At: at, Payload: []byte("pos=7")}, beat)
}

func TestEncodeRefuses(t *testing.T) {
	tuple := FourTuple{netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2")}
	mixed := FourTuple{netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("[::1]:2")}
	zone := FourTuple{netip.MustParseAddrPort("[fe80::1%eth0]:1"), netip.MustParseAddrPort("[fe80::2]:2")}
	long := make([]byte, MaxOptions+1)
	for name, r := range map[string]Record{
		"payload too long": Bytes{Payload: make([]byte, MaxPayload+1)},
		"a node's name":    Handover{Node: "no name"},
		"config too long":  Hello{Config: make([]byte, MaxConfig+1)},
		"options":          ConnOpen{Tuple: tuple, Options: long},
		"accept options":   ConnAccept{Options: long},
		"no tuple":         ConnOpen{},
		"mixed families":   ConnOpen{Tuple: mixed},
		"zone":             ConnOpen{Tuple: zone},
		"no reason":        ConnEnd{},
		"from after cut":   Generation{From: 2, Cut: 1},
		"too many takes":   Order{Takes: make([]Take, MaxTakes+1)},
		"take of no kind":  Order{Takes: []Take{{What: 3}}},
		"take from afar":   Order{Takes: []Take{{Conn: 1 << 61}}},
		"take back":        Order{Takes: []Take{{Conn: 1<<61 - 1}, {Conn: 1<<64 - 9}}},
		"nil":              nil,
	} {
		dst := []byte("kept")
		got, err := AppendRecord(dst, r)
		if !errors.Is(err, ErrInvalid) || string(got) != "kept" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	good := encodeBatch(t, 1, 0, 1, ConnEnd{Conn: 1, Reason: EndReset}, ServerExit{})
	reseal := func(f func(b []byte) []byte) []byte {
		b := f(bytes.Clone(good))
		crc := b[4:8]
		be.PutUint32(crc, crcOf(b[8:]))
		return b
	}
	for _, c := range []struct {
		name string
		b    []byte
		want error
	}{
		{"empty", nil, ErrCorrupt},
		{"not a batch", []byte("hello, world, this is no batch at all, is it?"), ErrCorrupt},
		{"cut short", good[:len(good)-1], ErrCorrupt},
		{"only a header", good[:batchHeader-1], ErrCorrupt},
		{"later version", append([]byte{'F', 'T', 'B', 2}, good[4:]...), ErrVersion},
		{"unknown kind", reseal(func(b []byte) []byte { b[batchHeader] = 31; return b }), ErrVersion},
		{"kind zero", reseal(func(b []byte) []byte { b[batchHeader] = 0; return b }), ErrVersion},
		{"epoch zero", reseal(func(b []byte) []byte { clear(b[8:16]); return b }), ErrCorrupt},
		{"position zero", reseal(func(b []byte) []byte { clear(b[24:32]); return b }), ErrCorrupt},
		{"positions overflow", reseal(func(b []byte) []byte { be.PutUint64(b[24:], 1<<64-1); return b }), ErrCorrupt},
		{"no records", reseal(func(b []byte) []byte { clear(b[32:36]); return b }), ErrCorrupt},
		{"too few counted", reseal(func(b []byte) []byte { be.PutUint32(b[32:], 1); return b }), ErrCorrupt},
		{"too many counted", reseal(func(b []byte) []byte { be.PutUint32(b[32:], 3); return b }), ErrCorrupt},
		{"absurd count", reseal(func(b []byte) []byte { be.PutUint32(b[32:], 1<<32-1); return b }), ErrCorrupt},
		{"wrong body length", reseal(func(b []byte) []byte { be.PutUint32(b[36:], 1); return b }), ErrCorrupt},
		{"record length past the end", reseal(func(b []byte) []byte { b[batchHeader+1] = 100; return b }), ErrCorrupt},
		{"bad end reason", reseal(func(b []byte) []byte { b[batchHeader+2+8] = 9; return b }), ErrCorrupt},
		{"too large", make([]byte, MaxBatch+1), ErrCorrupt},
	} {
		if _, err := DecodeBatch(c.b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		if _, err := DecodeBatch(b); err == nil {
			t.Errorf("a flipped bit in octet %d goes unnoticed", i)
		}
	}
}

func genTuple(t *rapid.T) FourTuple {
	if rapid.Bool().Draw(t, "v6") {
		b := rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "addrs")
		return FourTuple{netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)), rapid.Uint16().Draw(t, "p")),
			netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[16:])), rapid.Uint16().Draw(t, "p"))}
	}
	b := rapid.SliceOfN(rapid.Byte(), 8, 8).Draw(t, "addrs")
	return FourTuple{netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), rapid.Uint16().Draw(t, "p")),
		netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:])), rapid.Uint16().Draw(t, "p"))}
}

func genRecord(t *rapid.T) Record {
	conn := ConnID(rapid.Uint64().Draw(t, "conn"))
	seq := func() seqnum.Value { return seqnum.Value(rapid.Uint32().Draw(t, "seq")) }
	opts := func() []byte { return rapid.SliceOfN(rapid.Byte(), 0, MaxOptions).Draw(t, "opts") }
	switch rapid.IntRange(1, 14).Draw(t, "kind") {
	case 1:
		return ConnOpen{conn, genTuple(t), seq(), rapid.Uint16().Draw(t, "win"), opts()}
	case 2:
		return ConnAccept{conn, seq(), opts()}
	case 3:
		n := rapid.SampledFrom([]int{0, 1, 100, 1460, MaxPayload}).Draw(t, "n")
		return Bytes{conn, seq(), bytes.Repeat([]byte{rapid.Byte().Draw(t, "b")}, n)}
	case 4:
		return ClientFin{conn, seq()}
	case 5:
		return ClientReset{conn, seq()}
	case 6:
		return ConnState{conn, seq(), seq(), seq(), rapid.Uint32().Draw(t, "ts"), rapid.Uint32().Draw(t, "ts"), seq()}
	case 7:
		return ConnEnd{conn, EndReason(rapid.IntRange(1, 5).Draw(t, "reason"))}
	case 8:
		cut := rapid.Uint64().Draw(t, "cut")
		return Generation{rapid.Uint64().Draw(t, "id"), Sum(opts()), Position(cut), Position(rapid.Uint64Range(0, cut).Draw(t, "from")), StreamSeq(conn)}
	case 11:
		return ConnDial{conn, genTuple(t), seq(), rapid.Uint16().Draw(t, "win"), opts()}
	case 12:
		return ConnAnswer{conn, seq(), rapid.Uint16().Draw(t, "win"), opts()}
	case 13:
		return Urgent{conn, seq()}
	case 9:
		return ServerExit{rapid.Uint32().Draw(t, "status")}
	case 14:
		var takes []Take
		for range rapid.IntRange(0, 9).Draw(t, "takes") {
			take := Take{Conn: ConnID(rapid.Uint64Range(0, 1<<61-1).Draw(t, "conn")), What: TakeKind(rapid.IntRange(0, 2).Draw(t, "what"))}
			if take.What == TakeRead {
				take.Seq = seq()
			}
			takes = append(takes, take)
		}
		return Order{Position(rapid.Uint64().Draw(t, "upto")), takes}
	}
	return Hello{rapid.SliceOf(rapid.Byte()).Draw(t, "config")}
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		recs := rapid.SliceOfN(rapid.Custom(genRecord), 1, 8).Draw(t, "recs")
		first := Position(rapid.Uint64Range(1, 1<<63).Draw(t, "first"))
		got, err := DecodeBatch(encodeBatch(t, 5, 6, first, recs...))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, Batch{Epoch: 5, Number: 6, First: first, Records: recs}, got)
	})
}

func TestPointersEncodeAsValues(t *testing.T) {
	b, s := Bytes{Conn: 1, Seq: 2, Payload: []byte("x")}, ConnState{Conn: 9, ServerTS: 1}
	if !bytes.Equal(encodeBatch(t, 1, 0, 1, b, s), encodeBatch(t, 1, 0, 1, &b, &s)) {
		t.Fatal("a pointer encodes otherwise than its value")
	}
}

// FuzzDecodeBatch: whatever comes in, nothing panics, and what is taken is the
// one wire form of what it was taken for.
func FuzzDecodeBatch(f *testing.F) {
	f.Add(encodeBatch(f, 7, 42, 1001, oneOfEach()...)[8:])
	for _, r := range oneOfEach() {
		f.Add(encodeBatch(f, 1, 0, 1, r)[8:])
	}
	f.Fuzz(func(t *testing.T, tail []byte) {
		// The checksum is put right, or the fuzzer would never get past it.
		b := append([]byte{'F', 'T', 'B', 1, 0, 0, 0, 0}, tail...)
		be.PutUint32(b[4:], crcOf(tail))
		got, err := DecodeBatch(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		again, err := DecodeBatch(encodeBatch(t, got.Epoch, got.Number, got.First, got.Records...))
		if err != nil {
			t.Fatalf("cannot read what it wrote: %v", err)
		}
		equal(t, got, again)
	})
}

func FuzzDecodeFenceAndBeat(f *testing.F) {
	f.Add(encodeFence(Fence{Epoch: 1, Node: "a", At: time.UnixMicro(1)})[8:])
	f.Add(appendBeat(nil, 1, 1, []byte("x"))[4:])
	f.Fuzz(func(t *testing.T, tail []byte) {
		b := append([]byte{'F', 'T', 'F', 1, 0, 0, 0, 0}, tail...)
		be.PutUint32(b[4:], crcOf(tail))
		if x, err := decodeFence(b, 1<<63); err == nil && !bytes.Equal(encodeFence(x), b) {
			t.Fatalf("fence %+v has another wire form than %x", x, b)
		}
		b = append([]byte{'F', 'T', 'H', 1}, tail...)
		if x, err := decodeBeat("b.", "b.r.n", b, time.Now()); err == nil && !bytes.Equal(appendBeat(nil, x.Run, x.N, x.Payload), b) {
			t.Fatalf("beat %+v has another wire form than %x", x, b)
		}
	})
}

func FuzzParseJoin(f *testing.F) {
	j := Join{Addr: "10.0.0.9:4222", Secret: strings.Repeat("A", 43), Fingerprint: [32]byte{9}}
	f.Add(j.String())
	f.Add("ftckpt1.@")
	f.Fuzz(func(t *testing.T, s string) {
		j, err := ParseJoin(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if j.String() != s {
			t.Fatalf("%q comes back as %q", s, j)
		}
	})
}

func TestParseJoin(t *testing.T) {
	j := Join{Addr: "[2001:db8::1]:4222", Secret: strings.Repeat("B", 42) + "A", Fingerprint: [32]byte{9, 31: 1}}
	got, err := ParseJoin(j.String())
	if err != nil || got != j {
		t.Fatalf("%+v, %v", got, err)
	}
	s := j.String()
	secret, _, _ := strings.Cut(s, "@")
	for name, bad := range map[string]string{
		"empty":        "",
		"a URL":        "nats://10.0.0.1:4222",
		"no address":   secret,
		"no port":      secret + "@host",
		"port 0":       secret + "@host:0",
		"no host":      secret + "@:4222",
		"cut secret":   joinPrefix + s[len(joinPrefix)+1:],
		"newline":      s + "\n",
		"version":      strings.Replace(s, "ftckpt1", "ftckpt9", 1),
		"far too long": s + strings.Repeat("x", 1000),
	} {
		_, err := ParseJoin(bad)
		if !errors.Is(err, ErrInvalid) || strings.Contains(err.Error(), j.Secret) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, ok := range []string{"a", "redis-1", "A_b", "0", strings.Repeat("x", 32)} {
		if _, err := newNames(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{"", "-a", "_a", "a.b", "a b", "a*", "a>", "../a", "ä", strings.Repeat("x", 33)} {
		if _, err := newNames(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for host, want := range map[string]string{"db1.example": "db1_example", "": "node", "--": "node", "ok-1": "ok-1", strings.Repeat("h", 99): strings.Repeat("h", 64)} {
		if got := NodeName(host); got != want || checkName("node", got, maxNodeName) != nil {
			t.Errorf("node name of %q is %q", host, got)
		}
	}
}
