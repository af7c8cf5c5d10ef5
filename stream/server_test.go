package stream

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func start(t *testing.T, o ServerOptions) *Server {
	t.Helper()
	if o.StoreDir == "" {
		o.StoreDir = t.TempDir()
	}
	s, err := StartServer(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func openLog(t *testing.T, cfg Config) (*Log, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	l, err := Open(ctx, cfg)
	if err == nil {
		t.Cleanup(func() { l.Close() })
	}
	return l, err
}

func TestServerKeepsItsIdentityAndData(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "store")
	s := start(t, ServerOptions{StoreDir: dir, Listen: "127.0.0.1:0", Sync: SyncAlways})
	join, addr := s.JoinString(), s.Addr()
	l, err := openLog(t, Config{Service: "a", Join: join})
	if err != nil {
		t.Fatal(err)
	}
	w := acquire(t, l, "n")
	if err := w.Append(1, ServerExit{Status: 7}); err != nil {
		t.Fatal(err)
	}
	drain(t, w)
	w.Close()
	l.Close()
	if _, err := StartServer(ServerOptions{StoreDir: dir}); err == nil || !strings.Contains(err.Error(), "another log server") {
		t.Fatalf("two servers in one directory: %v", err)
	}
	s.Shutdown()
	s = start(t, ServerOptions{StoreDir: dir, Listen: addr, Sync: SyncAlways})
	if s.JoinString() != join {
		t.Fatal("another join string after a restart")
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if i, err := d.Info(); err != nil || filepath.Dir(path) == dir && !d.IsDir() && i.Mode().Perm() != 0o600 || path == dir && i.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v, %v", path, i.Mode(), err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err = openLog(t, Config{Service: "a", Join: join})
	if err != nil {
		t.Fatal(err)
	}
	if w := acquire(t, l, "n"); w.Epoch() != 2 || w.Next() != 2 {
		t.Fatalf("after a restart: epoch %d, next %d", w.Epoch(), w.Next())
	}
}

func TestServerRefusesStrangers(t *testing.T) {
	s := start(t, ServerOptions{Listen: "127.0.0.1:0"})
	j, err := ParseJoin(s.JoinString())
	if err != nil {
		t.Fatal(err)
	}
	wrong := j
	wrong.Secret = strings.Repeat("A", 43)
	if _, err := openLog(t, Config{Service: "a", Join: wrong.String()}); !errors.Is(err, ErrRefused) || strings.Contains(err.Error(), wrong.Secret) {
		t.Errorf("wrong secret: %v", err)
	}
	wrong = j
	wrong.Fingerprint[0] ^= 1
	if _, err := openLog(t, Config{Service: "a", Join: wrong.String()}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("wrong fingerprint: %v", err)
	}
	if _, err := openLog(t, Config{Service: "a", URL: "nats://" + s.Addr(), Token: j.Secret}); err == nil {
		t.Error("a connection in plain text was let in")
	}
	nc, err := nats.Connect("tls://"+s.Addr(), nats.TLSHandshakeFirst(), nats.Secure(j.tls()), nats.Timeout(5*time.Second))
	if err == nil {
		nc.Close()
		t.Error("a connection without the secret was let in")
	}
	// In plain text not a word comes out.
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if line, err := bufio.NewReader(c).ReadString('\n'); err == nil || line != "" {
		t.Errorf("a stranger was told %q", line)
	}
	// Only the server's own port is open, and only with TLS 1.3.
	if c, err := tls.Dial("tcp", s.Addr(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		c.Close()
		t.Error("TLS 1.2 was let in")
	}
	if s.ns.MonitorAddr() != nil || s.ns.ClusterAddr() != nil {
		t.Error("another port is open")
	}
}

func TestServerOptions(t *testing.T) {
	for name, o := range map[string]ServerOptions{
		"no directory": {},
		"listen":       {StoreDir: t.TempDir(), Listen: "nowhere"},
		"listen port":  {StoreDir: t.TempDir(), Listen: "127.0.0.1:99999"},
		"advertise":    {StoreDir: t.TempDir(), Listen: "127.0.0.1:0", Advertise: "two words"},
		"sync":         {StoreDir: t.TempDir(), Sync: 9},
	} {
		if s, err := StartServer(o); !errors.Is(err, ErrInvalid) {
			if s != nil {
				s.Shutdown()
			}
			t.Errorf("%s: %v", name, err)
		}
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	if _, err := StartServer(ServerOptions{StoreDir: t.TempDir(), Listen: busy.Addr().String()}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a port in use: %v", err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := StartServer(ServerOptions{StoreDir: dir}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a damaged secret: %v", err)
	}
	if s := start(t, ServerOptions{}); s.JoinString() != "" || s.Addr() != "" {
		t.Errorf("a server that listens nowhere has %q, %q", s.JoinString(), s.Addr())
	}
}

func TestAdvertised(t *testing.T) {
	for _, c := range []struct{ adv, listen, want string }{
		{"", "10.0.0.1:4222", "10.0.0.1:4222"},
		{"log.example", "0.0.0.0:4222", "log.example:4222"},
		{"log.example:5000", "0.0.0.0:4222", "log.example:5000"},
		{"2001:db8::1", "[::]:4222", "[2001:db8::1]:4222"},
		{"[2001:db8::1]:5", "[::]:4222", "[2001:db8::1]:5"},
	} {
		if got, err := advertised(c.adv, c.listen); err != nil || got != c.want {
			t.Errorf("%q on %q gives %q, %v", c.adv, c.listen, got, err)
		}
	}
	got, err := advertised("", "0.0.0.0:4222")
	if host, _, serr := net.SplitHostPort(got); err != nil || serr != nil || net.ParseIP(host) == nil || net.ParseIP(host).IsUnspecified() {
		t.Errorf("unspecified gives %q, %v", got, err)
	}
}

func TestSpaceIsWatched(t *testing.T) {
	heard := make(chan Space, 8)
	s := start(t, ServerOptions{MinFree: 1 << 62, OnSpace: func(x Space) { heard <- x }})
	select {
	case x := <-heard:
		if !x.Low || x.Free == 0 || !s.Space().Low {
			t.Fatalf("%+v", x)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody says that space is low")
	}
	if x := start(t, ServerOptions{MinFree: 1}).Space(); x.Low || x.Free == 0 {
		t.Fatalf("%+v", x)
	}
}

func TestOpenRefuses(t *testing.T) {
	s := start(t, ServerOptions{})
	for name, cfg := range map[string]Config{
		"no place":   {Service: "a"},
		"two places": {Service: "a", Server: s, URL: "nats://127.0.0.1"},
		"no service": {Server: s},
		"scheme":     {Service: "a", URL: "http://127.0.0.1"},
		"two logins": {Service: "a", URL: "nats://127.0.0.1", User: "u", Token: "t"},
		"join":       {Service: "a", Join: "nonsense"},
		"replicas":   {Service: "a", Server: s, Replicas: 99},
	} {
		if _, err := openLog(t, cfg); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := openLog(t, Config{Service: "a", Server: s, Replicas: 3}); !errors.Is(err, ErrRefused) {
		t.Errorf("three replicas on one server: %v", err)
	}
	if _, err := openLog(t, Config{Service: "huge", Server: s, LogBytes: 1 << 60}); !errors.Is(err, ErrFull) {
		t.Errorf("a log larger than the disk: %v", err)
	}
	if _, err := openLog(t, Config{Service: "a", URL: "nats://" + freeAddr(t)}); !errors.Is(err, ErrUnreachable) {
		t.Errorf("nobody there: %v", err)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := openLog(t, Config{Service: "a", URL: "nats://user:pa55@" + silent.Addr().String()}); !errors.Is(err, ErrUnreachable) || strings.Contains(err.Error(), "pa55") {
		t.Errorf("a silent server: %v", err)
	}
}

// TestOpenForeignServers: the user's own NATS in states it may be in.
func TestOpenForeignServers(t *testing.T) {
	run := func(o *server.Options) string {
		t.Helper()
		o.Host, o.Port, o.NoLog, o.NoSigs, o.StoreDir = "127.0.0.1", server.RANDOM_PORT, true, true, t.TempDir()
		s, err := server.NewServer(o)
		if err != nil {
			t.Fatal(err)
		}
		s.Start()
		t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
		if !s.ReadyForConnections(10 * time.Second) {
			t.Fatal("not ready")
		}
		return "nats://" + s.Addr().String()
	}
	if _, err := openLog(t, Config{Service: "a", URL: run(&server.Options{})}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "JetStream") {
		t.Errorf("no JetStream: %v", err)
	}
	u := run(&server.Options{JetStream: true, Username: "u", Password: "p"})
	if _, err := openLog(t, Config{Service: "a", URL: u, User: "u", Password: "wrong"}); !errors.Is(err, ErrRefused) {
		t.Errorf("wrong password: %v", err)
	}
	nc, err := nats.Connect(u, nats.UserInfo("u", "p"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	n, _ := newNames("old")
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: n.logStream, Subjects: []string{n.data, n.fence}}); err != nil {
		t.Fatal(err)
	}
	if _, err := openLog(t, Config{Service: "old", URL: u, User: "u", Password: "p"}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "discard policy") {
		t.Errorf("a stream that drops old records: %v", err)
	}
	l, err := openLog(t, Config{Service: "a", URL: u, User: "u", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.LastFence(t.Context()); !errors.Is(err, ErrMissing) {
		t.Errorf("a new log's fence: %v", err)
	}
	if w := acquire(t, l, "n"); w.Epoch() != 1 {
		t.Errorf("epoch %d", w.Epoch())
	}
	// Somebody deletes the log under a writer's feet: it holds, and says why.
	w := acquire(t, l, "n")
	if err := js.DeleteStream(t.Context(), l.names.logStream); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(1, ServerExit{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the writer stalls", func() error {
		if st := w.State(); st.Phase != WriterStalled {
			return st.Err
		}
		return nil
	})
	if _, err := openLog(t, Config{Service: "a", URL: u, User: "u", Password: "p"}); err != nil {
		t.Fatal(err) // creates the stream anew
	}
	eventually(t, 10*time.Second, "the writer says that the log has gone back", func() error {
		if st := w.State(); st.Phase != WriterStalled || !errors.Is(st.Err, ErrRolledBack) {
			return st.Err
		}
		return nil
	})
}

// BenchmarkAppendToStable is one record at a time, through the whole of it.
func BenchmarkAppendToStable(b *testing.B) {
	for name, listen := range map[string]string{"in-process": "", "tls": "127.0.0.1:0"} {
		b.Run(name, func(b *testing.B) {
			s, err := StartServer(ServerOptions{StoreDir: b.TempDir(), Listen: listen})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Shutdown()
			cfg := Config{Service: "bench", Server: s}
			if listen != "" {
				cfg = Config{Service: "bench", Join: s.JoinString()}
			}
			l, err := Open(b.Context(), cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			w, err := l.Acquire(b.Context(), "n")
			if err != nil {
				b.Fatal(err)
			}
			defer w.Close()
			stable := make(chan Position, 1)
			w.OnStable(func(p Position) { stable <- p })
			r := &Bytes{Conn: 1, Payload: make([]byte, 1400)}
			b.ReportAllocs()
			p := w.Next()
			for b.Loop() {
				if err := w.Append(p, r); err != nil {
					b.Fatal(err)
				}
				<-stable
				p++
			}
		})
	}
}
