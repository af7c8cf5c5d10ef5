// Command server is the server of the packet bench: it does what its clients'
// octets say (see e2e/packet). It is deterministic: what it says on a connection
// follows from what it has read, whatever the order of the connections.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/ftckpt/ftckpt/e2e/packet"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: server ADDR:PORT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

func run(addr string) error {
	lc := net.ListenConfig{KeepAlive: -1} // what it says by itself is none of a script's
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return err
	}
	s := &server{past: map[uint16][]string{}, tokens: map[uint16]chan struct{}{}}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go s.serve(c.(*net.TCPConn))
	}
}

type server struct {
	mu     sync.Mutex
	past   map[uint16][]string // what became of each port's connections
	tokens map[uint16]chan struct{}
}

func (s *server) note(port uint16, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.past[port] = append(s.past[port], what)
}

// token is what a connection that holds waits for.
func (s *server) token(port uint16) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tokens[port] == nil {
		s.tokens[port] = make(chan struct{}, 64)
	}
	return s.tokens[port]
}

// conn is one connection.
type conn struct {
	*server
	c      *net.TCPConn
	r      *bufio.Reader
	port   uint16
	said   int  // octets
	atEOF  int  // octets to write at the client's FIN
	stays  bool // and then hold before closing
	closed bool
}

func (s *server) serve(c *net.TCPConn) {
	k := &conn{server: s, c: c, r: bufio.NewReader(c), port: uint16(c.RemoteAddr().(*net.TCPAddr).Port)}
	s.note(k.port, "open")
	for !k.closed {
		line, err := k.r.ReadString('\n')
		if err == nil {
			err = k.do(strings.TrimSuffix(line, "\n"))
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, io.EOF):
			s.note(k.port, "eof")
			if k.atEOF > 0 {
				_ = k.pattern(k.atEOF) // the close below tells
			}
			if k.stays {
				<-k.token(k.port)
			}
		case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
			s.note(k.port, "reset")
		default:
			s.note(k.port, strconv.Quote(err.Error()))
		}
		break
	}
	if !k.closed {
		k.close()
	}
}

func (k *conn) close() {
	k.closed = true
	k.note(k.port, "closed") // before anybody can see it
	_ = k.c.Close()
}

// do carries a command out.
func (k *conn) do(line string) error {
	verb, arg, _ := strings.Cut(line, " ")
	n, _ := strconv.Atoi(arg)
	switch verb {
	case "E":
		return k.write([]byte(arg + "\n"))
	case "W":
		return k.pattern(n)
	case "D":
		b := make([]byte, n)
		if _, err := io.ReadFull(k.r, b); err != nil {
			return err
		}
		return k.write(fmt.Appendf(nil, "%d %08x\n", n, packet.Sum(b)))
	case "F":
		return k.c.CloseWrite()
	case "C":
		k.close()
	case "L":
		if err := k.c.SetLinger(0); err != nil {
			return err
		}
		k.close()
	case "K", "S":
		k.atEOF, k.stays = n, verb == "S"
	case "H":
		<-k.token(k.port)
	case "X", "Q":
		other, ok := packet.PortOf(k.port, (arg + " ")[0])
		if !ok {
			return k.write([]byte("no such connection\n"))
		}
		if verb == "X" {
			k.token(other) <- struct{}{}
			return nil
		}
		k.mu.Lock()
		past := strings.Join(k.past[other], " ")
		k.mu.Unlock()
		return k.write([]byte(past + "\n"))
	default:
		return k.write(fmt.Appendf(nil, "unknown command %q\n", line))
	}
	return nil
}

func (k *conn) pattern(n int) error {
	return k.write(packet.AppendPattern(nil, k.port, k.said, n))
}

func (k *conn) write(b []byte) error {
	n, err := k.c.Write(b)
	k.said += n
	return err
}
