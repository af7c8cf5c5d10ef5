package packet

import "hash/crc32"

// Ports of scripts: each has MaxConns in a row, from FirstPort on.
const (
	FirstPort = 20000
	MaxConns  = 8
)

// Pattern is the octet at an offset of what the server says to a port: another
// one in each connection, and without a short period.
func Pattern(port uint16, offset int) byte {
	return 'a' + byte((offset*7+offset/251+int(port))%26)
}

// AppendPattern appends n octets of the pattern from offset on.
func AppendPattern(dst []byte, port uint16, offset, n int) []byte {
	for i := range n {
		dst = append(dst, Pattern(port, offset+i))
	}
	return dst
}

// Sum is what the server answers to D.
func Sum(b []byte) uint32 { return crc32.ChecksumIEEE(b) }

// PortOf is the port of a connection, by the name that a script gives it ('A' is
// the first), among those of the script that own belongs to.
func PortOf(own uint16, name byte) (uint16, bool) {
	if name < 'A' || name >= 'A'+MaxConns || own < FirstPort {
		return 0, false
	}
	return own - (own-FirstPort)%MaxConns + uint16(name-'A'), true
}
