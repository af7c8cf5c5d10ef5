package capsule

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ReservePorts keeps TCP inside from choosing the given local ports by itself,
// beside those that are reserved already. A server may still bind to them.
func (c *Capsule) ReservePorts(ports []uint16) error {
	const name = "net.ipv4.ip_local_reserved_ports"
	return c.Do(func() error {
		had, err := readSysctl(name)
		if err != nil {
			return fmt.Errorf("read %s inside: %w", name, err)
		}
		var all []string
		if had != "" {
			all = append(all, had)
		}
		sorted := slices.Clone(ports)
		slices.Sort(sorted)
		for _, p := range slices.Compact(sorted) {
			all = append(all, strconv.Itoa(int(p)))
		}
		return writeSysctl(name, strings.Join(all, ",")+"\n")
	})
}
