package stream

import (
	"fmt"
	"strings"
)

const (
	maxServiceName = 32
	maxNodeName    = 64
)

// names are the subjects and streams of one service (docs/WIRE.md).
type names struct {
	service string

	logStream string
	data      string // batches
	fence     string // fences

	storeStream string
	chunk       string // prefix, the content's hash follows
	blob        string // prefix, the content's hash follows

	beat string // prefix, role and node follow
}

func newNames(service string) (names, error) {
	if err := checkName("service", service, maxServiceName); err != nil {
		return names{}, err
	}
	p := "ftckpt." + service + "."
	return names{
		service:     service,
		logStream:   "ftckpt-" + service + "-log",
		data:        p + "log",
		fence:       p + "fence",
		storeStream: "ftckpt-" + service + "-store",
		chunk:       p + "chunk.",
		blob:        p + "blob.",
		beat:        p + "beat.",
	}, nil
}

// checkName holds a name to what is one token of a subject and safe as a file
// name, too: JetStream makes directories of stream names.
func checkName(what, s string, max int) error {
	if s == "" || len(s) > max {
		return fmt.Errorf("%w %s name %q: must have 1 to %d characters", ErrInvalid, what, s, max)
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !alnum(c) && (i == 0 || c != '-' && c != '_') {
			return fmt.Errorf("%w %s name %q: only letters, digits, and after the first also '-' and '_'", ErrInvalid, what, s)
		}
	}
	return nil
}

func alnum(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// NodeName makes a node name of a host name: what a node name cannot have
// becomes '_'.
func NodeName(host string) string {
	b := []byte(host[:min(len(host), maxNodeName)])
	for i, c := range b {
		if !alnum(c) && c != '-' && c != '_' {
			b[i] = '_'
		}
	}
	s := strings.TrimLeft(string(b), "-_")
	if s == "" {
		return "node"
	}
	return s
}
