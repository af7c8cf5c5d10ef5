package check

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/ftckpt/ftckpt/internal/remote"
)

// Connection is a TCP connection that a process of the tree has opened.
type Connection struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
	PID    int            `json:"pid"`
	FD     int            `json:"fd"`
}

// Remedy is what makes it survive a takeover.
func (c Connection) Remedy() string {
	return fmt.Sprintf("survives a takeover if it comes from the service's address and ftckpt protect is given --outgoing %s", remote.Host(c.Remote))
}

// maxOpened bounds a report.
const maxOpened = 64

// opened lists the connections that the tree has opened: those whose local port
// it does not listen on. lines are of /proc/net/tcp and tcp6.
func (in *inspection) opened(lines []string) {
	heard := map[uint16]bool{}
	for _, l := range in.report.Listeners {
		heard[l.Addr.Port()] = true
	}
	for _, line := range lines {
		c, inode, ok := parseConnection(line)
		h, ours := in.sockets[inode]
		if !ok || !ours || heard[c.Local.Port()] || c.Local.Addr().IsLoopback() || len(in.report.Opened) >= maxOpened {
			continue
		}
		c.PID, c.FD = h.pid, h.fd
		in.report.Opened = append(in.report.Opened, c)
	}
	slices.SortFunc(in.report.Opened, func(a, b Connection) int {
		if n := a.Remote.Compare(b.Remote); n != 0 {
			return n
		}
		return a.Local.Compare(b.Local)
	})
}

// connected are the states, as the tables print them, in which a socket has a
// peer: all but TIME_WAIT, CLOSE, LISTEN and those without a socket of their own.
var connected = []string{"01", "02", "04", "05", "08", "09", "0B"}

// parseConnection reads a line of /proc/net/tcp or tcp6, as parseListener does.
func parseConnection(line string) (c Connection, inode uint64, ok bool) {
	f := strings.Fields(line)
	if len(f) < 10 || !slices.Contains(connected, f[3]) {
		return c, 0, false
	}
	if c.Local, ok = parseAddr(f[1]); !ok {
		return c, 0, false
	}
	if c.Remote, ok = parseAddr(f[2]); !ok {
		return c, 0, false
	}
	inode, err := strconv.ParseUint(f[9], 10, 64)
	return c, inode, err == nil
}
