package node

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/pace"
	"github.com/ftckpt/ftckpt/internal/remote"
	"github.com/ftckpt/ftckpt/stream"
)

// service is what a standby has to know in order to run it; it travels in the
// Hello record at the beginning of every epoch.
type service struct {
	Name    string         `json:"name"`
	VIPs    []netip.Prefix `json:"vips"`
	Ports   []uint16       `json:"ports"`
	Clients []netip.Prefix `json:"clients,omitempty"` // networks whose connections are protected; none: all
	Dev     string         `json:"dev"`               // the primary's interface; the capsule's gets the same name
	// Outgoing are the peers to which connections that the server opens from a
	// VIP are protected.
	Outgoing  []remote.Range `json:"outgoing,omitempty"`
	Interval  time.Duration  `json:"interval"`             // between generations, ns
	Schedule  string         `json:"schedule,omitempty"`   // cron expression of generations, instead of Interval
	MaxReplay time.Duration  `json:"max_replay,omitempty"` // ns, see pace.Plan
	// IdleExpiry is how long a connection may be idle and stay protected, ns; 0: for
	// ever.
	IdleExpiry time.Duration `json:"idle_expiry,omitempty"`
	// Anew says that the epoch began with a server that ran already: what it did
	// before is in no log, so no generation of an earlier epoch leads to it.
	Anew bool `json:"anew,omitempty"`
}

func (s service) hello() []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic("encode service: " + err.Error()) // plain data always encodes
	}
	return b
}

// parseService reads a Hello without trust.
func parseService(b []byte) (service, error) {
	var s service
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("read the service's description: %w", err)
	}
	switch {
	case len(s.VIPs) == 0, len(s.VIPs) > config.MaxVIPs, !allValid(s.VIPs),
		len(s.Clients) > config.MaxClientNets, !allValid(s.Clients),
		len(s.Ports) == 0, len(s.Ports) > config.MaxPorts, len(s.Outgoing) > config.MaxOutgoing, s.Interval < 0:
		return s, fmt.Errorf("read the service's description: incomplete (%s)", b)
	case s.IdleExpiry < 0:
		return s, fmt.Errorf("read the service's description: connections that expire after %v", s.IdleExpiry)
	case s.MaxReplay < 0:
		return s, fmt.Errorf("read the service's description: a replay of at most %v", s.MaxReplay)
	case s.Dev == "" || len(s.Dev) > 15 || strings.ContainsAny(s.Dev, "/ \t\n%"):
		return s, fmt.Errorf("read the service's description: interface name %q", s.Dev)
	}
	if _, err := config.ParseSchedule(s.Schedule); err != nil {
		return s, fmt.Errorf("read the service's description: schedule: %w", err)
	}
	return s, nil
}

// plan is when generations are due.
func (s service) plan() pace.Plan {
	schedule, _ := config.ParseSchedule(s.Schedule) // it was checked where it came from
	return pace.Plan{Interval: s.Interval, Schedule: schedule, MaxReplay: s.MaxReplay}
}

func allValid(ps []netip.Prefix) bool {
	return !slices.ContainsFunc(ps, func(p netip.Prefix) bool { return !p.IsValid() || p.Addr().Is4In6() })
}

// addrs are the service's addresses.
func (s service) addrs() []netip.Addr {
	var a []netip.Addr
	for _, v := range s.VIPs {
		a = append(a, v.Addr())
	}
	return a
}

// vips are the service's addresses for people.
func (s service) vips() string { return strings.Join(texts(s.VIPs), ", ") }

// at reports whether an address and port is one of the service's.
func (s service) at(server netip.AddrPort) bool {
	return slices.Contains(s.Ports, server.Port()) && slices.Contains(s.addrs(), server.Addr())
}

// serves reports whether a tuple is a client's connection to the service that is
// protected.
func (s service) serves(t stream.FourTuple) bool {
	in := func(n netip.Prefix) bool { return n.Contains(t.Client.Addr()) }
	return s.at(t.Server) && (len(s.Clients) == 0 || slices.ContainsFunc(s.Clients, in))
}

// dialled reports whether a tuple is a protected connection that the server
// opened.
func (s service) dialled(t stream.FourTuple) bool {
	return slices.Contains(s.addrs(), t.Server.Addr()) && !s.at(t.Server) && remote.Any(s.Outgoing, t.Client)
}

// nodeID is this installation's name among the nodes of a service: the host's
// name and something of its own, kept in the state directory, since two hosts
// may have one name.
func nodeID(stateDir string) (string, error) {
	file := filepath.Join(stateDir, "node")
	b, err := os.ReadFile(file)
	if err == nil && len(strings.TrimSpace(string(b))) > 0 {
		return strings.TrimSpace(string(b)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read node id: %w", err)
	}
	host, err := os.Hostname()
	if err != nil {
		host = "node"
	}
	host = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(host))
	var salt [4]byte
	_, _ = rand.Read(salt[:]) // never fails (crypto/rand)
	id := fmt.Sprintf("%.32s-%s", host, hex.EncodeToString(salt[:]))
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return "", fmt.Errorf("make state directory: %w", err)
	}
	if err := os.WriteFile(file, []byte(id+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("keep node id: %w", err)
	}
	return id, nil
}
