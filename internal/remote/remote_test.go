package remote

import (
	"encoding/json"
	"net/netip"
	"testing"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7":            "192.0.2.7/32",
		"192.0.2.7:5432":       "192.0.2.7/32:5432",
		"192.0.2.0/24":         "192.0.2.0/24",
		"192.0.2.0/24:5432":    "192.0.2.0/24:5432",
		"0.0.0.0/0:6379":       "0.0.0.0/0:6379",
		"[2001:db8::7]:443":    "2001:db8::7/128:443",
		"2001:db8::7":          "2001:db8::7/128",
		"2001:db8::/64":        "2001:db8::/64",
		"2001:db8::/64:443":    "2001:db8::/64:443",
		"":                     "",
		"192.0.2.7:0":          "",
		"192.0.2.0/24:0":       "",
		"192.0.2.0/24:65536":   "",
		"192.0.2.7/24":         "", // bits behind the length
		"192.0.2.0/33":         "",
		"db.example:5432":      "",
		"fe80::1%eth0":         "",
		"::ffff:192.0.2.7":     "",
		"192.0.2.0/24:5432:1":  "",
		"192.0.2.0/24 :5432":   "",
		"192.0.2.0/-1":         "",
		"192.0.2.0/24:":        "",
		"2001:db8::/64:443:12": "",
	} {
		r, err := Parse(in)
		if want == "" {
			if err == nil {
				t.Errorf("%q is read as %v", in, r)
			}
			continue
		}
		if err != nil || r.String() != want {
			t.Errorf("%q is read as %v (%v), want %s", in, r, err, want)
			continue
		}
		var back Range
		b, err := json.Marshal(r)
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || back != r {
			t.Errorf("%v is %s in JSON and %v when read again (%v)", r, b, back, err)
		}
	}
}

func TestContains(t *testing.T) {
	some := []Range{{netip.MustParsePrefix("192.0.2.0/24"), 5432}, {netip.MustParsePrefix("198.51.100.7/32"), 0}}
	for a, want := range map[string]bool{
		"192.0.2.9:5432": true, "192.0.2.9:5433": false, "192.0.3.9:5432": false,
		"198.51.100.7:1": true, "198.51.100.8:1": false, "[2001:db8::1]:5432": false,
	} {
		if got := Any(some, netip.MustParseAddrPort(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	if Any(nil, netip.MustParseAddrPort("192.0.2.9:1")) {
		t.Error("no range has an address")
	}
}
