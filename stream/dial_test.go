package stream

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
)

// dials are the records of connections that the server opens, with extreme
// values.
func dials() []Record {
	v4 := FourTuple{netip.MustParseAddrPort("10.0.0.1:40001"), netip.MustParseAddrPort("192.168.7.9:6379")}
	v6 := FourTuple{netip.MustParseAddrPort("[2001:db8::1]:65535"), netip.MustParseAddrPort("[2001:db8::2]:443")}
	return []Record{
		ConnDial{Conn: 5, Tuple: v4, ISN: 0xfffffff0, Window: 64240, Options: []byte{2, 4, 5, 180}},
		ConnDial{Conn: 1<<64 - 1, Tuple: v6, Options: bytes.Repeat([]byte{1}, MaxOptions)},
		ConnAnswer{Conn: 5, ISN: 0x12345678, Window: 65160, Options: []byte{2, 4, 5, 180, 1, 3, 3, 7}},
		ConnAnswer{Conn: 6, ISN: 0xffffffff, Window: 65535, Options: bytes.Repeat([]byte{1}, MaxOptions)},
		ConnAnswer{},
	}
}

func TestGoldenDials(t *testing.T) {
	recs := dials()
	b := encodeBatch(t, 7, 42, 1001, recs...)
	want := golden(t, "dial-v1.hex", b)
	if !bytes.Equal(b, want) {
		t.Fatalf("the wire form has changed: logs that exist could not be read any more\n got %x\nwant %x", b, want)
	}
	got, err := DecodeBatch(want)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, Batch{Epoch: 7, Number: 42, First: 1001, Records: recs}, got)
}

func TestDialsRefused(t *testing.T) {
	for name, r := range map[string]Record{
		"options of a dial":    ConnDial{Tuple: dials()[0].(ConnDial).Tuple, Options: make([]byte, MaxOptions+1)},
		"no tuple":             ConnDial{},
		"options of an answer": ConnAnswer{Options: make([]byte, MaxOptions+1)},
	} {
		if _, err := AppendRecord(nil, r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for kind, b := range map[Kind][]byte{
		KindConnDial:   make([]byte, 8),
		KindConnAnswer: make([]byte, 13),
	} {
		if r, err := decodeBody(kind, b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("a short body of kind %d is %v, %v", kind, r, err)
		}
	}
	if _, err := decodeBody(KindConnAnswer, make([]byte, 14+MaxOptions+1)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("too many options: %v", err)
	}
}
