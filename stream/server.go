package stream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// SyncMode is when the embedded server makes appends durable.
type SyncMode uint8

// When the embedded server makes appends durable.
const (
	SyncInterval SyncMode = iota // every second: a power loss costs the last second
	SyncAlways                   // before each acknowledgement: a power loss costs nothing
)

// ServerOptions are those of the embedded server.
type ServerOptions struct {
	// Listen is host:port; port 0 takes any. "" listens nowhere: this process
	// alone can use the server.
	Listen string
	// Advertise is host or host:port for the join string where Listen's is not
	// what others can dial (0.0.0.0); "" takes Listen, or for an unspecified
	// address this machine's first global one.
	Advertise string
	// StoreDir holds the streams, the certificate and the secret. It is made
	// 0700 and belongs to one server at a time.
	StoreDir string
	Sync     SyncMode
	// MinFree is the free space of StoreDir's file system, in octets, under
	// which Space is low; 0: 512 MiB.
	MinFree uint64
	// OnSpace, if set, hears every change between enough and low space, from a
	// goroutine of the Server's.
	OnSpace func(Space)
}

const (
	defaultMinFree = 512 << 20
	maxPayload     = 1 << 20
	startTimeout   = 10 * time.Second
	syncInterval   = time.Second
	writeDeadline  = 3 * time.Second
)

// Server is an embedded NATS server with JetStream, TLS and a secret. Nothing
// but NATS over TLS is open: no monitoring, no plain text, no anonymous user.
type Server struct {
	ns    *server.Server
	dir   string
	lock  *os.File
	join  Join
	addr  string
	stop  chan struct{}
	done  chan struct{}
	once  sync.Once
	mu    sync.Mutex
	space Space
}

// StartServer runs a server in this process. Certificate and secret are made
// at the first start in StoreDir and used again later, so that the join string
// stays the same. Errors: ErrInvalid for options; the file system's and the
// network's as they are.
func StartServer(o ServerOptions) (*Server, error) {
	s, err := startServer(o)
	if err != nil {
		return nil, fmt.Errorf("start log server: %w", err)
	}
	return s, nil
}

func startServer(o ServerOptions) (_ *Server, err error) {
	if o.StoreDir == "" || o.Sync > SyncAlways {
		return nil, fmt.Errorf("%w options: no store directory, or sync mode %d", ErrInvalid, o.Sync)
	}
	if o.MinFree == 0 {
		o.MinFree = defaultMinFree
	}
	if err := os.MkdirAll(o.StoreDir, 0o700); err != nil {
		return nil, err
	}
	s := &Server{dir: o.StoreDir, stop: make(chan struct{}), done: make(chan struct{})}
	if s.lock, err = lockDir(o.StoreDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	cert, secret, err := identity(o.StoreDir)
	if err != nil {
		return nil, err
	}
	s.join = Join{Secret: secret, Fingerprint: sha256.Sum256(cert.Certificate[0])}

	so := &server.Options{
		ServerName: "ftckpt-" + b64.EncodeToString(s.join.Fingerprint[:6]),
		DontListen: o.Listen == "",
		NoSigs:     true, NoLog: true, NoSystemAccount: true,
		Authorization: secret,
		JetStream:     true,
		StoreDir:      o.StoreDir,
		SyncInterval:  syncInterval,
		SyncAlways:    o.Sync == SyncAlways,
		MaxPayload:    maxPayload,
		TLSConfig: &tls.Config{
			MinVersion:   tls.VersionTLS13,
			Certificates: []tls.Certificate{cert},
		},
		TLSHandshakeFirst: true, // a stranger does not even get the greeting
		TLSTimeout:        2,
		AuthTimeout:       2,
		// A peer whose host has died takes nothing more: neither appends of others
		// nor our own end may wait for it.
		WriteDeadline: writeDeadline,
	}
	if o.Listen != "" {
		host, port, err := net.SplitHostPort(o.Listen)
		if err != nil {
			return nil, fmt.Errorf("%w listen address %q: %w", ErrInvalid, o.Listen, err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%w listen address %q: %w", ErrInvalid, o.Listen, err)
		}
		so.Host, so.Port = host, int(n)
		if so.Host == "" {
			so.Host = "0.0.0.0"
		}
		if n == 0 {
			so.Port = server.RANDOM_PORT
		}
		// The library does not say why it cannot listen; this does.
		probe, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", o.Listen)
		if err != nil {
			return nil, err
		}
		if err := probe.Close(); err != nil {
			return nil, err
		}
	}
	if s.ns, err = server.NewServer(so); err != nil {
		return nil, err
	}
	s.ns.Start()
	if !s.ns.ReadyForConnections(startTimeout) || !s.ns.JetStreamEnabled() {
		return nil, fmt.Errorf("not ready within %v; look at the free space and the permissions of %s", startTimeout, o.StoreDir)
	}
	if o.Listen != "" {
		s.addr = s.ns.Addr().String()
		if s.join.Addr, err = advertised(o.Advertise, s.addr); err != nil {
			return nil, err
		}
	}
	if err := s.sync(); err != nil {
		return nil, err
	}
	s.space = Space{Free: freeSpace(s.dir)}
	s.space.Low = lowSpace(false, s.space.Free, o.MinFree)
	go s.watchSpace(o.MinFree, o.OnSpace)
	return s, nil
}

// advertised is the address others dial: adv completed from the one listened
// on, or that one.
func advertised(adv, listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", err
	}
	switch {
	case adv == "":
		if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() {
			return listen, nil
		}
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return "", err
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				return net.JoinHostPort(n.IP.String(), port), nil
			}
		}
		return net.JoinHostPort("127.0.0.1", port), nil
	case checkAddr(adv) == nil:
		return adv, nil
	}
	adv = net.JoinHostPort(strings.Trim(adv, "[]"), port)
	if err := checkAddr(adv); err != nil {
		return "", fmt.Errorf("%w advertised address: %w", ErrInvalid, err)
	}
	return adv, nil
}

// identity reads the server's certificate and secret, or makes them.
func identity(dir string) (tls.Certificate, string, error) {
	certFile, secretFile := filepath.Join(dir, "server.pem"), filepath.Join(dir, "secret")
	raw, err := os.ReadFile(secretFile)
	if errors.Is(err, fs.ErrNotExist) {
		secret := make([]byte, secretSize)
		if _, err := rand.Read(secret); err != nil {
			return tls.Certificate{}, "", err
		}
		raw = []byte(b64.EncodeToString(secret) + "\n")
		err = writeNew(secretFile, raw)
	}
	if err != nil {
		return tls.Certificate{}, "", err
	}
	secret := strings.TrimSpace(string(raw))
	if b, err := b64.DecodeString(secret); err != nil || len(b) != secretSize {
		return tls.Certificate{}, "", fmt.Errorf("%w secret in %s; remove the file to make another (every join string changes)", ErrCorrupt, secretFile)
	}
	both, err := os.ReadFile(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		if both, err = newCertificate(); err == nil {
			err = writeNew(certFile, both)
		}
	}
	if err != nil {
		return tls.Certificate{}, "", err
	}
	cert, err := tls.X509KeyPair(both, both)
	if err != nil {
		return tls.Certificate{}, "", fmt.Errorf("read %s: %w; remove the file to make another (every join string changes)", certFile, err)
	}
	return cert, secret, nil
}

// newCertificate makes a self-signed certificate and its key, in PEM. Nobody
// looks at its names or dates: it is known by its fingerprint.
func newCertificate() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "ftckpt"},
		DNSNames:     []string{"ftckpt"},
		NotBefore:    time.Now().Add(-24 * time.Hour),
		NotAfter:     time.Now().AddDate(100, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})...), nil
}

// writeNew writes a file that appears whole or not at all, even after a power
// loss.
func writeNew(name string, b []byte) error {
	f, err := os.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// show is the server's place, for people.
func (s *Server) show() string {
	if s.addr == "" {
		return "embed://"
	}
	return "embed://" + s.join.Addr
}

// JoinString is what another host's Config.Join takes: address, secret and
// certificate fingerprint. "" when the server listens nowhere.
func (s *Server) JoinString() string {
	if s.addr == "" {
		return ""
	}
	return s.join.String()
}

// Addr is the address it listens on; "" for nowhere.
func (s *Server) Addr() string { return s.addr }

// Shutdown ends the server and waits until its files are closed. Close the
// Writers, Readers and Logs that use it first; they would keep trying.
func (s *Server) Shutdown() {
	s.once.Do(func() {
		close(s.stop)
		<-s.done
		s.end()
	})
}

// end stops what was started of the server and gives the directory back.
func (s *Server) end() {
	if s.ns != nil {
		s.ns.Shutdown()
		s.ns.WaitForShutdown()
	}
	_ = s.lock.Close() // the lock goes with the descriptor, whatever this says
}
