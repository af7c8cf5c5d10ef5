package packet

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ftckpt/ftckpt/tcpwrap"
)

func TestParse(t *testing.T) {
	s, err := Parse("x", `
# a comment
< S 0:0 win 65535 <mss 1460,sackOK,ts,wscale 7>
> S. 0:0 ack 1 <no ts> within 2s
<< PU. "a \"quoted\" <text>\n"   # and a comment
> F. 1:11(10) ack 5
< . <sack 5:9 11:13>
recv "abc"
recv 100
takeover
live
checkpoint
`)
	if err != nil {
		t.Fatal(err)
	}
	var verbs []string
	for _, st := range s.steps {
		verbs = append(verbs, st.verb)
	}
	if d := cmp.Diff([]string{"<", ">", "<<", ">", "<", "recv", "recv", "takeover", "live", "checkpoint"}, verbs); d != "" {
		t.Error(d)
	}
	syn, push, fin := s.steps[0].seg, s.steps[2].seg, s.steps[3].seg
	if syn.flags != tcpwrap.SYN || *syn.win != 65535 || len(syn.opts) != 4 || syn.opts[3].args[0] != 7 {
		t.Errorf("%+v", syn)
	}
	if push.flags != tcpwrap.PSH|tcpwrap.URG|tcpwrap.ACK || string(push.text) != "a \"quoted\" <text>\n" || push.seq != nil {
		t.Errorf("%+v", push)
	}
	if *fin.seq != 1 || *fin.end != 11 || *fin.ack != 5 || fin.win != nil {
		t.Errorf("%+v", fin)
	}
	if got := s.steps[4].seg.opts[0].args; !cmp.Equal(got, []int{5, 9, 11, 13}) {
		t.Error(got)
	}
	if list, _ := s.phases(); !cmp.Equal(list, []Phase{Takeover, Live, Again}) {
		t.Error(list)
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"jump":                         "no such step",
		"<":                            "wants flags",
		"< X":                          "no flag",
		"< . 5:3":                      "what is",
		"< . 1:3 \"abc\"":              "3 octets, not 2",
		"< . \"abc":                    "without its end",
		"< . <ts":                      "without their end",
		"< . <mss>":                    "no such thing",
		"< . ack":                      "wants a number",
		"conn AB":                      "wants a letter",
		"live":                         "the order is",
		"takeover\ncheckpoint":         "the order is",
		"checkpoint\ncheckpoint":       "the order is",
		"takeover\nlive\nlive":         "the order is",
		"checkpoint\ntakeover\nlive 3": "wants no words",
	} {
		if _, err := Parse("x", text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: want an error with %q, got %v", text, want, err)
		}
	}
}

func TestScriptsParse(t *testing.T) {
	files, err := filepath.Glob("../testdata/packet/*/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts (%v)", err)
	}
	for _, f := range files {
		if _, err := Load(f); err != nil {
			t.Error(err)
		}
	}
}

// Ports of one script stay together, and do not meet those of the next.
func TestPortOf(t *testing.T) {
	for _, own := range []uint16{FirstPort, FirstPort + 1, FirstPort + MaxConns - 1} {
		if p, ok := PortOf(own, 'B'); !ok || p != FirstPort+1 {
			t.Errorf("B of %d is %d, %v", own, p, ok)
		}
	}
	if p, ok := PortOf(FirstPort+MaxConns, 'A'); !ok || p != FirstPort+MaxConns {
		t.Errorf("A of the next script is %d, %v", p, ok)
	}
	for _, name := range []byte{'@', 'A' + MaxConns, ' '} {
		if _, ok := PortOf(FirstPort, name); ok {
			t.Errorf("%q is a connection", name)
		}
	}
}
