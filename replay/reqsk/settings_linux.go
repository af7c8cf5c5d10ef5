package reqsk

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Settings without which the kernel refuses a connection. They matter while it
// is being made only.
const (
	tcpSyncookies    = "tcp_syncookies"
	tcpWindowScaling = "tcp_window_scaling"
	tcpSACK          = "tcp_sack"
	tcpTimestamps    = "tcp_timestamps"
)

const settingsDir = "/proc/sys/net/ipv4/"

// settings remembers which switches of a namespace have been looked at, and
// which were off. turnOn and putBack are for a thread that is there.
type settings struct {
	seen map[string]bool // true: was off
}

func (s *settings) on(name string) bool {
	_, ok := s.seen[name]
	return ok
}

func (s *settings) turnOn(name string) error {
	b, err := os.ReadFile(settingsDir + name)
	if err != nil {
		return fmt.Errorf("read %s (needs /proc, and a kernel with SYN cookies): %w", name, err)
	}
	off := strings.TrimSpace(string(b)) == "0"
	if off {
		if err := os.WriteFile(settingsDir+name, []byte("1"), 0); err != nil {
			return fmt.Errorf("set net.ipv4.%s = 1: %w", name, err)
		}
	}
	if s.seen == nil {
		s.seen = map[string]bool{}
	}
	s.seen[name] = off
	return nil
}

func (s *settings) changed() bool {
	for _, off := range s.seen {
		if off {
			return true
		}
	}
	return false
}

func (s *settings) putBack() error {
	var errs []error
	for name, off := range s.seen {
		if off {
			errs = append(errs, os.WriteFile(settingsDir+name, []byte("0"), 0))
		}
	}
	s.seen = nil
	return errors.Join(errs...)
}
