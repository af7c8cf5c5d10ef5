package packet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/tcpwrap"
)

// Script is a parsed script.
type Script struct {
	Name  string
	steps []step
}

// step is one line.
type step struct {
	line int
	text string
	verb string

	seg  segment       // of <, << and >
	opts []option      // of open
	own  bool          // opts were given
	data []byte        // of recv with a text
	n    int           // of recv and gather
	word string        // of conn and icmp
	wait time.Duration // of silence and sleep
}

// segment is how a script writes one; nil is what it leaves out.
type segment struct {
	flags    tcpwrap.Flags
	seq, end *int
	ack, win *int
	urg      int // urgent pointer of what is sent
	opts     []option
	hasOpts  bool
	text     []byte
	hasText  bool
	within   time.Duration
}

// option is a TCP option, or with no set, that it must not be there.
type option struct {
	name string
	no   bool
	args []int
}

// Load reads a script.
func Load(file string) (*Script, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return Parse(strings.TrimSuffix(filepath.Base(file), filepath.Ext(file)), string(b))
}

// Parse parses a script.
func Parse(name, text string) (*Script, error) {
	s := &Script{Name: name}
	for i, line := range strings.Split(text, "\n") {
		words, err := split(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, i+1, err)
		}
		if len(words) == 0 {
			continue
		}
		st := step{line: i + 1, text: strings.TrimSpace(line), verb: words[0]}
		if err := st.parse(words[1:]); err != nil {
			return nil, fmt.Errorf("%s:%d: %s: %w", name, i+1, st.text, err)
		}
		s.steps = append(s.steps, st)
	}
	if _, err := s.phases(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// split cuts a line into words; what is in quotes or in angle brackets is one.
func split(line string) (words []string, err error) {
	rest := strings.TrimSpace(line)
	for rest != "" && rest[0] != '#' {
		var n int
		switch {
		case rest[0] == '"':
			q, err := strconv.QuotedPrefix(rest)
			if err != nil {
				return nil, errors.New("a text without its end")
			}
			n = len(q)
		case rest[0] == '<' && len(words) > 0:
			if n = strings.IndexByte(rest, '>') + 1; n == 0 {
				return nil, errors.New("options without their end")
			}
		default:
			if n = strings.IndexAny(rest, " \t"); n < 0 {
				n = len(rest)
			}
		}
		words = append(words, rest[:n])
		rest = strings.TrimSpace(rest[n:])
	}
	return words, nil
}

func (s *step) parse(args []string) (err error) {
	one := func() (string, error) {
		if len(args) != 1 {
			return "", errors.New("wants one word more")
		}
		return args[0], nil
	}
	switch s.verb {
	case "<", "<<", ">":
		s.seg, err = parseSegment(args)
	case "open":
		if len(args) == 1 {
			s.own = true
			s.opts, err = parseOptions(args[0])
		} else if len(args) > 1 {
			err = errors.New("wants options or nothing")
		}
	case "recv", "gather":
		var w string
		if w, err = one(); err != nil {
			return err
		}
		if w[0] == '"' && s.verb == "recv" {
			t, err := strconv.Unquote(w)
			s.data, s.n = []byte(t), len(t)
			return err
		}
		s.n, err = strconv.Atoi(w)
	case "conn", "icmp":
		s.word, err = one()
		if s.verb == "conn" && (len(s.word) != 1 || s.word[0] < 'A' || s.word[0] >= 'A'+MaxConns) {
			err = fmt.Errorf("wants a letter from A to %c", 'A'+MaxConns-1)
		}
	case "silence", "sleep":
		var w string
		if w, err = one(); err == nil {
			s.wait, err = time.ParseDuration(w)
		}
	case "renew", "checkpoint", "takeover", "live":
		if len(args) > 0 {
			err = errors.New("wants no words")
		}
	default:
		err = errors.New("no such step")
	}
	return err
}

func parseSegment(w []string) (s segment, err error) {
	if len(w) == 0 {
		return s, errors.New("wants flags")
	}
	for _, f := range w[0] {
		i := strings.IndexRune("FSRP.U", f)
		if i < 0 {
			return s, fmt.Errorf("no flag %q", f)
		}
		s.flags |= 1 << i
	}
	for w = w[1:]; len(w) > 0; w = w[1:] {
		number := func() (*int, error) {
			if len(w) < 2 {
				return nil, fmt.Errorf("%s wants a number", w[0])
			}
			n, err := strconv.Atoi(w[1])
			w = w[1:]
			return &n, err
		}
		switch {
		case w[0] == "ack":
			s.ack, err = number()
		case w[0] == "win":
			s.win, err = number()
		case w[0] == "urg":
			var n *int
			if n, err = number(); err == nil {
				s.urg = *n
			}
		case w[0] == "within" && len(w) > 1:
			s.within, err = time.ParseDuration(w[1])
			w = w[1:]
		case w[0][0] == '"':
			var t string
			t, err = strconv.Unquote(w[0])
			s.text, s.hasText = []byte(t), true
		case w[0][0] == '<':
			s.hasOpts = true
			s.opts, err = parseOptions(w[0])
		default:
			from, to, ok := strings.Cut(strings.Split(w[0], "(")[0], ":")
			a, err1 := strconv.Atoi(from)
			b, err2 := strconv.Atoi(to)
			if !ok || err1 != nil || err2 != nil || b < a {
				return s, fmt.Errorf("what is %q?", w[0])
			}
			s.seq, s.end = &a, &b
		}
		if err != nil {
			return s, err
		}
	}
	if s.hasText && s.seq != nil && *s.end-*s.seq != len(s.text) {
		return s, fmt.Errorf("the text has %d octets, not %d", len(s.text), *s.end-*s.seq)
	}
	return s, nil
}

func parseOptions(s string) (opts []option, err error) {
	s = strings.TrimSpace(strings.Trim(s, "<>"))
	if s == "" {
		return nil, nil
	}
	for one := range strings.SplitSeq(s, ",") {
		f := strings.Fields(one)
		var o option
		if len(f) > 1 && f[0] == "no" {
			o.no, f = true, f[1:]
		}
		if len(f) == 0 {
			return nil, errors.New("an option without a name")
		}
		o.name = f[0]
		for _, a := range f[1:] {
			for p := range strings.SplitSeq(a, ":") {
				n, err := strconv.Atoi(p)
				if err != nil {
					return nil, fmt.Errorf("option %s: %w", o.name, err)
				}
				o.args = append(o.args, n)
			}
		}
		want := map[string][]int{"mss": {1}, "wscale": {1}, "sackOK": {0}, "nop": {0}, "ts": {0, 1, 2}, "sack": {2, 4, 6}}[o.name]
		ok := o.no && len(o.args) == 0
		for _, n := range want {
			ok = ok || n == len(o.args)
		}
		if !ok || want == nil {
			return nil, fmt.Errorf("option %q: no such thing", one)
		}
		opts = append(opts, o)
	}
	return opts, nil
}

// Phase is something that all scripts of a world go through together.
type Phase int

// The phases, in their order.
const (
	Checkpoint Phase = iota // a generation
	Takeover                // the failure
	Live                    // the standby has taken over
	Again                   // a generation of the new primary
	phases
)

func (p Phase) String() string {
	return [...]string{"checkpoint", "takeover", "live", "checkpoint after it", "end"}[p]
}

// phases are those that a script names, in their order.
func (s *Script) phases() (list []Phase, err error) {
	at := Phase(-1)
	for i := range s.steps {
		var p Phase
		switch s.steps[i].verb {
		case "checkpoint":
			p = Checkpoint
			if at >= Checkpoint {
				p = Again
			}
		case "takeover":
			p = Takeover
		case "live":
			p = Live
		default:
			continue
		}
		if p <= at || p == Again && at != Live || p == Live && at != Takeover {
			return nil, fmt.Errorf("line %d: the order is checkpoint, takeover, live, checkpoint, each once at most", s.steps[i].line)
		}
		at = p
		list = append(list, p)
	}
	return list, nil
}
