package stream

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// The conformance suite runs against three deployments: a server embedded in
// this process, a server in a process of its own and a cluster of three. The
// test binary is also the program of the server processes.

const (
	childEnv  = "FTCKPT_STREAM_TEST_SERVER"
	clusterPw = "conformance"
)

// child says what a server process is to be.
type child struct {
	Dir, Listen string
	// For a member of a cluster; else it is a Server of this package.
	Name, Route string
	Routes      []string
}

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(spec); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runChild(spec string) error {
	var c child
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		return err
	}
	if c.Name == "" {
		s, err := StartServer(ServerOptions{StoreDir: c.Dir, Listen: c.Listen})
		if err != nil {
			return err
		}
		defer s.Shutdown()
		fmt.Println("ready", s.JoinString())
	} else {
		host, port := split(c.Listen)
		rhost, rport := split(c.Route)
		o := &server.Options{
			ServerName: c.Name, Host: host, Port: port, NoLog: true, NoSigs: true,
			JetStream: true, StoreDir: c.Dir, SyncInterval: syncInterval, MaxPayload: maxPayload,
			Authorization: clusterPw,
			Cluster:       server.ClusterOpts{Name: "conformance", Host: rhost, Port: rport},
		}
		for _, r := range c.Routes {
			u, err := url.Parse("nats://" + r)
			if err != nil {
				return err
			}
			o.Routes = append(o.Routes, u)
		}
		s, err := server.NewServer(o)
		if err != nil {
			return err
		}
		s.Start()
		if !s.ReadyForConnections(startTimeout) {
			return fmt.Errorf("not ready")
		}
		fmt.Println("ready", "nats://"+c.Listen)
	}
	_, err := io.Copy(io.Discard, os.Stdin) // lives as long as the test
	return err
}

func split(addr string) (string, int) {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	return a.IP.String(), a.Port
}

// process is a running child.
type process struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	said string // what followed "ready"
}

func startChild(t *testing.T, c child) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	spec, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(exe)}
	p.cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if said, ok := strings.CutPrefix(strings.TrimSpace(line), "ready "); ok {
		p.said = said
		return p
	}
	t.Fatalf("server process: %q, %v", line, err)
	return nil
}

// kill is kill -9.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// target is one deployment of the log.
type target struct {
	name     string
	replicas int
	// config is how a client finds it; through the proxy where there is one to
	// break connections.
	config func(service string, via *proxy) Config
	addr   func() string // to put a proxy before
	// crash kills the process that leads the log with SIGKILL and starts it
	// again; nil where that is this process.
	crash func(l *Log)
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func joinVia(join string, via *proxy) string {
	if via == nil {
		return join
	}
	j, err := ParseJoin(join)
	if err != nil {
		panic(err)
	}
	j.Addr = via.addr
	return j.String()
}

func embedded(t *testing.T) *target {
	s, err := StartServer(ServerOptions{StoreDir: t.TempDir(), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return &target{name: "embedded", replicas: 1, addr: s.Addr,
		config: func(service string, via *proxy) Config {
			if via != nil {
				return Config{Service: service, Join: joinVia(s.JoinString(), via)}
			}
			return Config{Service: service, Server: s}
		}}
}

func separate(t *testing.T) *target {
	c := child{Dir: t.TempDir(), Listen: freeAddr(t)}
	p := startChild(t, c)
	return &target{name: "process", replicas: 1, addr: func() string { return c.Listen },
		config: func(service string, via *proxy) Config {
			return Config{Service: service, Join: joinVia(p.said, via)}
		},
		crash: func(l *Log) {
			p.kill()
			was := p.said
			if p = startChild(t, c); p.said != was {
				t.Fatal("another join string after a restart")
			}
		}}
}

func cluster(t *testing.T) *target {
	const n = 3
	var cs []child
	var routes, urls []string
	for i := range n {
		c := child{Name: fmt.Sprint("n", i), Listen: freeAddr(t), Route: freeAddr(t), Dir: filepath.Join(t.TempDir(), "js")}
		cs, routes, urls = append(cs, c), append(routes, c.Route), append(urls, "nats://"+c.Listen)
	}
	ps := map[string]*process{}
	for i := range cs {
		cs[i].Routes = routes
		ps[cs[i].Name] = startChild(t, cs[i])
	}
	tg := &target{name: "cluster", replicas: n, addr: func() string { return cs[0].Listen },
		config: func(service string, via *proxy) Config {
			u := strings.Join(urls, ",")
			if via != nil {
				u = "nats://" + via.addr
			}
			return Config{Service: service, URL: u, Token: clusterPw} // a cluster gets its replicas unasked
		},
		crash: func(l *Log) {
			st, err := l.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range cs {
				if c.Name == st.Leader {
					ps[c.Name].kill()
					ps[c.Name] = startChild(t, c)
					return
				}
			}
			t.Fatalf("the log has no leader among ours: %+v", st)
		}}
	return tg
}

// open opens the service's log; a cluster may need a moment to elect.
func (tg *target) open(t *testing.T, service string, set func(*Config), via *proxy) *Log {
	t.Helper()
	cfg := tg.config(service, via)
	if set != nil {
		set(&cfg)
	}
	var l *Log
	eventually(t, 20*time.Second, "the log opens", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var err error
		l, err = Open(ctx, cfg)
		return err
	})
	t.Cleanup(func() { l.Close() })
	return l
}

// eventually waits for a condition, looking again every few milliseconds.
func eventually(t *testing.T, within time.Duration, what string, f func() error) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s: %v", within, what, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// proxy stands between a client and a server and breaks what the test wants
// broken.
type proxy struct {
	addr   string
	server string
	l      net.Listener
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
	mute  bool // what the server says is swallowed
	down  bool // connections are refused
}

func newProxy(t *testing.T, server string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: l.Addr().String(), server: server, l: l, conns: map[net.Conn]bool{}}
	p.wg.Add(1)
	go p.accept()
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) accept() {
	defer p.wg.Done()
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		s, err := net.Dial("tcp", p.server)
		p.mu.Lock()
		if err != nil || p.down {
			p.mu.Unlock()
			c.Close()
			if err == nil {
				s.Close()
			}
			continue
		}
		p.conns[c], p.conns[s] = true, true
		p.mu.Unlock()
		p.wg.Add(2)
		go p.copy(s, c, false)
		go p.copy(c, s, true)
	}
}

func (p *proxy) copy(dst, src net.Conn, fromServer bool) {
	defer p.wg.Done()
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		mute := p.mute && fromServer
		p.mu.Unlock()
		if mute {
			continue
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

// set makes the proxy swallow answers or refuse connections.
func (p *proxy) set(mute, down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute, p.down = mute, down
}

// cut breaks all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
		delete(p.conns, c)
	}
}
