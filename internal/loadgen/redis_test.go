package loadgen

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startRedis runs a redis-server of this test's own, on a free port.
func startRedis(t *testing.T) (addr string, admin *redis.Client) {
	t.Helper()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("needs redis-server")
	}
	// The server says which port it got only by listening: it is asked for one
	// that was free a moment ago, and again if that was taken.
	for range 5 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr = l.Addr().String()
		_, port, _ := net.SplitHostPort(addr)
		l.Close()
		log := filepath.Join(t.TempDir(), "log")
		cmd := exec.Command(bin, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir(), "--logfile", log)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if b, _ := os.ReadFile(log); bytes.Contains(b, []byte("Ready to accept connections")) {
				admin = redis.NewClient(&redis.Options{Addr: addr, DisableIdentity: true})
				t.Cleanup(func() { admin.Close() })
				return addr, admin
			}
			select {
			case <-ended:
			default:
				continue
			}
			break
		}
	}
	t.Fatal("redis-server did not start")
	return "", nil
}

func everything(addr string) Config {
	return Config{
		Addr: addr, Seed: 42, Redis: 3, Idle: 1, Upload: 1, Download: 1, Half: 1, PaceUS: 1000,
		TransferBytes: 1 << 20, TransferUS: 500_000, GraceUS: 20_000_000,
	}
}

// drive runs cfg; at is called once every connection is connected, and then the
// run goes on until done says so.
func drive(t *testing.T, cfg Config, at func(), done func(Message) bool) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stop := make(chan struct{})
	var stopOnce sync.Once
	connected := false
	res, err := Run(ctx, cfg, stop, func(m Message) {
		if !connected && m.Connected == cfg.Connections() {
			connected = true
			at()
		}
		if connected && done(m) {
			stopOnce.Do(func() { close(stop) })
		}
	})
	if err != nil || ctx.Err() != nil {
		t.Fatalf("run: %v %v", err, ctx.Err())
	}
	return res
}

func TestEveryReplyIsRight(t *testing.T) {
	addr, _ := startRedis(t)
	cfg := everything(addr)
	cfg.PaceUS, cfg.MaxSamples = 0, 100
	res := drive(t, cfg, func() {}, func(m Message) bool { return m.Requests > 20_000 })
	if res.Mismatches != 0 || res.Resets != 0 {
		t.Fatalf("%d mismatches, %d resets: %+v", res.Mismatches, res.Resets, res.Conns)
	}
	if res.Connections != 7 || res.BytesChecked < 1<<20 || res.StallUS == 0 || res.Seed != 42 {
		t.Errorf("%+v", res)
	}
	for _, c := range res.Conns {
		if c.Requests == 0 || c.BytesChecked == 0 || len(c.Samples.AtUS) == 0 || len(c.Samples.AtUS) > 100 {
			t.Errorf("connection %d (%s): %d requests, %d bytes, %d samples", c.ID, c.Kind, c.Requests, c.BytesChecked, len(c.Samples.AtUS))
		}
	}
}

func TestStallIsMeasured(t *testing.T) {
	addr, admin := startRedis(t)
	var paused time.Time
	res := drive(t, Config{Addr: addr, Redis: 2, PaceUS: 500}, func() {
		paused = time.Now()
		if err := admin.Do(t.Context(), "CLIENT", "PAUSE", "700", "ALL").Err(); err != nil {
			t.Error(err)
		}
	}, func(m Message) bool { return m.Oldest.After(paused.Add(750 * time.Millisecond)) })
	if res.Mismatches != 0 || res.Resets != 0 {
		t.Fatalf("%+v", res.Conns)
	}
	for _, c := range res.Conns {
		if c.StallUS < 600_000 || c.StallUS > 5_000_000 || c.StallAt.Sub(paused).Abs() > 200*time.Millisecond {
			t.Errorf("connection %d waited %d us, since %v after the pause; want about 700 ms", c.ID, c.StallUS, c.StallAt.Sub(paused))
		}
	}
}

// A connection in the middle of something does not count as alive again before
// it got an answer.
func TestOldestWaitsForEveryConnection(t *testing.T) {
	addr, admin := startRedis(t)
	cfg := everything(addr)
	var paused time.Time
	res := drive(t, cfg, func() {
		paused = time.Now()
		if err := admin.Do(t.Context(), "CLIENT", "PAUSE", "600", "ALL").Err(); err != nil {
			t.Error(err)
		}
	}, func(m Message) bool {
		if m.Time.Before(paused.Add(500*time.Millisecond)) && m.Oldest.After(paused.Add(100*time.Millisecond)) {
			t.Errorf("%v after the pause began all were alive since %v", m.Time.Sub(paused), m.Oldest.Sub(paused))
		}
		return m.Oldest.After(paused.Add(600 * time.Millisecond))
	})
	if res.Mismatches != 0 || res.Resets != 0 {
		t.Fatalf("%+v", res.Conns)
	}
}

func TestResetsAreCounted(t *testing.T) {
	addr, admin := startRedis(t)
	cfg := everything(addr)
	var killed time.Time
	res := drive(t, cfg, func() {
		// SKIPME is the default: the admin's connection stays.
		n, err := admin.Do(t.Context(), "CLIENT", "KILL", "TYPE", "normal").Int()
		if err != nil || n != cfg.Connections() {
			t.Errorf("killed %d of %d: %v", n, cfg.Connections(), err)
		}
		killed = time.Now()
	}, func(m Message) bool { return m.Oldest.After(killed) })
	if res.Resets != int64(cfg.Connections()) || res.Mismatches != 0 {
		t.Errorf("%d resets, %d mismatches, want one reset each: %+v", res.Resets, res.Mismatches, res.Conns)
	}
	for _, c := range res.Conns {
		if c.Resets != 1 || len(c.Errors) != 1 || !strings.Contains(c.Errors[0], "reset") {
			t.Errorf("connection %d (%s): %d resets: %v", c.ID, c.Kind, c.Resets, c.Errors)
		}
	}
}

func TestNoReplyIsAReset(t *testing.T) {
	addr, admin := startRedis(t)
	cfg := everything(addr)
	cfg.GraceUS = 300_000
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stop := make(chan struct{})
	var once sync.Once
	var paused time.Time
	res, err := Run(ctx, cfg, stop, func(m Message) {
		if m.Connected == cfg.Connections() {
			once.Do(func() {
				if err := admin.Do(t.Context(), "CLIENT", "PAUSE", "15000", "ALL").Err(); err != nil {
					t.Error(err)
				}
				paused = time.Now()
			})
		}
		// Long enough that the redis connections are all waiting.
		if stop != nil && !paused.IsZero() && time.Since(paused) > 300*time.Millisecond {
			select {
			case <-stop:
			default:
				close(stop)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := time.Since(paused); d > 5*time.Second {
		t.Errorf("gave up after %v", d)
	}
	for _, c := range res.Conns {
		if c.Kind == "redis" && c.Resets != 1 {
			t.Errorf("connection %d: %d resets: %v", c.ID, c.Resets, c.Errors)
		}
	}
}

// flipper is a proxy that inverts one bit of the server's n-th byte from when
// it is armed on; with text, of the first one from there that may not be of a
// line's end.
type flipper struct {
	target string
	armed  atomic.Bool
	n      int
	text   bool
	once   sync.Once
}

func (f *flipper) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		s, err := net.Dial("tcp", f.target)
		if err != nil {
			c.Close()
			return
		}
		go func() { _, _ = io.Copy(s, c); s.Close() }()
		go func() {
			defer c.Close()
			buf := make([]byte, 64<<10)
			seen := 0
			for {
				n, err := s.Read(buf)
				if f.armed.Load() {
					for at := max(f.n-seen, 0); at < n; at++ {
						if !f.text || (buf[at] != '\r' && buf[at] != '\n') {
							f.once.Do(func() { buf[at] ^= 0x10 })
							break
						}
					}
					seen += n
				}
				if _, werr := c.Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		}()
	}
}

// One wrong bit in some megabytes must be found, whatever kind of connection
// and whatever part of the reply it hits.
func TestOneWrongBitIsFound(t *testing.T) {
	addr, _ := startRedis(t)
	for _, c := range []struct {
		name string
		cfg  Config
		n    int
		text bool
	}{
		{"library", Config{Redis: 1}, 20_000, true}, // see meteredConn
		{"download", Config{Download: 1, TransferBytes: 1 << 20, TransferUS: 1000}, 777_777, false},
		{"half", Config{Half: 1}, 2000, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			f := &flipper{target: addr, n: c.n, text: c.text}
			go f.serve(l)
			defer l.Close()
			c.cfg.Addr = l.Addr().String()
			c.cfg.GraceUS = 500_000 // a wrong length may make the client wait for more
			start := time.Now()
			res := drive(t, c.cfg, func() { f.armed.Store(true) }, func(m Message) bool {
				return m.Mismatches+m.Resets > 0 || time.Since(start) > 15*time.Second
			})
			if res.Mismatches+res.Resets == 0 {
				t.Fatalf("a wrong bit was not found in %d bytes", res.BytesChecked)
			}
			if c.name == "download" && (res.Mismatches != 1 || !strings.Contains(res.Conns[0].Errors[0], "byte 777")) {
				t.Errorf("%+v", res.Conns[0].Errors)
			}
		})
	}
}

func TestMainSpeaksLines(t *testing.T) {
	addr, _ := startRedis(t)
	in, out := io.Pipe()
	rd, wr := io.Pipe()
	code := make(chan int, 1)
	go func() {
		code <- Main(t.Context(), nil, in, wr)
		wr.Close()
	}()
	go func() {
		_ = json.NewEncoder(out).Encode(Config{Addr: addr, Redis: 2, Seed: 7, PaceUS: 100})
	}()
	var stop sync.Once
	res, err := Follow(rd, func(m Message) {
		if m.Requests > 100 {
			stop.Do(func() { out.Close() })
		}
	})
	if err != nil || res.Requests <= 100 || res.Seed != 7 || len(res.Conns) != 2 || len(res.Conns[0].Samples.AtUS) == 0 {
		t.Errorf("%v %+v", err, res)
	}
	if c := <-code; c != 0 {
		t.Errorf("exit %d", c)
	}
	for _, bad := range []string{"", "{", `{"addr":""}` + "\n"} {
		var b bytes.Buffer
		if c := Main(t.Context(), nil, strings.NewReader(bad), &b); c == 0 || !strings.Contains(b.String(), "error") {
			t.Errorf("input %q: exit %d, %s", bad, c, b.String())
		}
	}
}
