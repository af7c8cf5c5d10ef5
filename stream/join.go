package stream

import (
	"encoding/base64"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// joinPrefix begins a join string; the digit is its version.
const joinPrefix = "ftckpt1."

// secretSize is the length of a server's secret in octets.
const secretSize = 32

// Join is a join string taken apart: ftckpt1.SECRET.FINGERPRINT@HOST:PORT,
// secret and fingerprint in unpadded base64url.
type Join struct {
	Addr        string   // host:port
	Secret      string   // 32 random octets in base64url
	Fingerprint [32]byte // SHA-256 of the server's certificate (DER)
}

var b64 = base64.RawURLEncoding.Strict()

// ParseJoin takes a join string apart: ErrInvalid. The error never shows the
// secret.
func ParseJoin(s string) (Join, error) {
	bad := func(what string) (Join, error) {
		return Join{}, fmt.Errorf("%w join string: %s; copy the whole line that the standby or log server printed", ErrInvalid, what)
	}
	if len(s) > 512 {
		return bad("too long")
	}
	rest, ok := strings.CutPrefix(s, joinPrefix)
	if !ok {
		return bad("does not begin with " + joinPrefix)
	}
	cred, addr, ok := strings.Cut(rest, "@")
	if !ok {
		return bad("no address")
	}
	secret, print, ok := strings.Cut(cred, ".")
	if !ok {
		return bad("no fingerprint")
	}
	if raw, err := b64.DecodeString(secret); err != nil || len(raw) != secretSize || strings.ContainsAny(secret, "\r\n") {
		return bad("damaged secret")
	}
	fp, err := b64.DecodeString(print)
	if err != nil || len(fp) != 32 || strings.ContainsAny(print, "\r\n") {
		return bad("damaged fingerprint")
	}
	if err := checkAddr(addr); err != nil {
		return bad(err.Error())
	}
	return Join{Addr: addr, Secret: secret, Fingerprint: [32]byte(fp)}, nil
}

// checkAddr holds an address to host:port with a usable port.
func checkAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return fmt.Errorf("address %q is not host:port", addr)
	}
	for _, c := range []byte(host) {
		if !alnum(c) && !strings.ContainsRune(".-_:%", rune(c)) {
			return fmt.Errorf("address %q has a host no one can dial", addr)
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("address %q has no usable port", addr)
	}
	return nil
}

func (j Join) String() string {
	return joinPrefix + j.Secret + "." + b64.EncodeToString(j.Fingerprint[:]) + "@" + j.Addr
}
