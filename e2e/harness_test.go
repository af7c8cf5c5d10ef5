package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
)

const (
	vip     = "10.77.0.100"
	vipCIDR = vip + "/24"
	port    = "6379"
	service = vip + ":" + port

	vip6     = "fd77::100"
	vip6CIDR = vip6 + "/64"
	service6 = "[" + vip6 + "]:" + port
)

// patience bounds every wait for something that must happen. It is not how
// long it may take: what has a limit is measured and compared.
const patience = 30 * time.Second

// ftckpt is the program under test.
var ftckpt string

func TestMain(m *testing.M) {
	lab.Hook()
	if len(os.Args) > 2 && os.Args[1] == ghostArg {
		if err := ghost(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "ghost:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "e2e: skipped: labs need root")
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "ftckpt-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	if ftckpt = os.Getenv("FTCKPT_E2E_BIN"); ftckpt == "" {
		ftckpt = filepath.Join(dir, "ftckpt")
		args := []string{"build", "-buildvcs=false", "-o", ftckpt}
		if os.Getenv("FTCKPT_E2E_RACE") != "" {
			args = append(args, "-race")
		}
		cmd := exec.CommandContext(ctx, "go", append(args, "../cmd/ftckpt")...)
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "e2e: build ftckpt: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// world is one lab and what a test runs in it.
type world struct {
	*testing.T
	lab                               *lab.Lab
	client, primary, standby, logHost *lab.Host
	dir                               string // of logs and captures
	seed                              uint64
	rng                               *rand.Rand

	vips    []string // of the service, with the lengths of their networks
	service string   // where clients find it

	agents   []*agent
	servers  []*server
	captures []*lab.Capture
	before   map[*lab.Host]survey
	starts   int
}

// newWorld builds a lab whose primary has the VIP, and undoes it, with a look
// for leftovers, when the test ends.
func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldAt(t, service, vipCIDR)
}

// newWorldAt is newWorld with other addresses; clients use the service at at.
func newWorldAt(t *testing.T, at string, vips ...string) *world {
	t.Helper()
	w := &world{T: t, seed: seedFor(t), before: map[*lab.Host]survey{}, vips: vips, service: at}
	w.rng = rand.New(rand.NewPCG(w.seed, 0))
	t.Logf("seed %d", w.seed)
	dir, err := os.MkdirTemp("", "ftckpt-e2e-"+strings.NewReplacer("/", "-", " ", "-").Replace(t.Name())+"-")
	if err != nil {
		t.Fatal(err)
	}
	w.dir = dir
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	w.lab, err = lab.New(ctx, lab.Topology{Hosts: []lab.HostSpec{
		{Name: "client", Addr: "10.77.0.2/24"},
		{Name: "primary", Addr: "10.77.0.3/24"},
		{Name: "standby", Addr: "10.77.0.4/24"},
		{Name: "log", Addr: "10.77.0.5/24"},
	}}, lab.Options{LogDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.end)
	w.client, w.primary, w.standby, w.logHost = w.lab.Host("client"), w.lab.Host("primary"), w.lab.Host("standby"), w.lab.Host("log")
	for i, h := range []*lab.Host{w.client, w.primary, w.standby, w.logHost} {
		w.must(h.AddAddr(fmt.Sprintf("fd77::%d/64", i+2)))
	}
	for _, v := range vips {
		w.must(w.primary.AddAddr(v))
	}
	for _, h := range []*lab.Host{w.client, w.primary, w.standby, w.logHost} {
		w.before[h] = w.look(h)
	}
	for _, h := range []*lab.Host{w.primary, w.standby} {
		w.capture(h)
	}
	return w
}

// seedFor is a seed of this test's own; FTCKPT_E2E_SEED repeats one.
func seedFor(t *testing.T) uint64 {
	if s := os.Getenv("FTCKPT_E2E_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("FTCKPT_E2E_SEED: %v", err)
		}
		return n
	}
	return rand.Uint64()
}

// runs is how often a test with a random failure is repeated.
func runs(t *testing.T) int {
	s := os.Getenv("FTCKPT_E2E_RUNS")
	if s == "" {
		return 2
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("FTCKPT_E2E_RUNS: want a positive number, not %q", s)
	}
	return n
}

func (w *world) capture(h *lab.Host) *lab.Capture {
	w.Helper()
	c, err := h.Capture(fmt.Sprintf("%s.pcap", h.Name()))
	if err != nil {
		w.Fatal(err)
	}
	w.captures = append(w.captures, c)
	return c
}

// end stops everything, the agents in the way their users do, and looks for
// what they left.
func (w *world) end() {
	start := time.Now()
	for _, keepsLog := range []bool{false, true} { // who needs the log before who keeps it
		for _, a := range slices.Backward(w.agents) {
			if a.keepsLog == keepsLog {
				a.stop()
			}
		}
	}
	if took := time.Since(start); took > 2*time.Second {
		w.Logf("waited %.1f s for: all agents stop", took.Seconds())
	}
	for _, s := range w.servers {
		_ = s.Signal(s.end)
		<-s.Done()
	}
	w.killRestored()
	for h, was := range w.before {
		if h.Alive() {
			w.compare(h, was)
		}
	}
	keep := w.Failed() || os.Getenv("FTCKPT_E2E_KEEP") != ""
	for _, c := range w.captures {
		if err := c.Stop(keep); err != nil {
			w.Error(err)
		}
	}
	if err := w.lab.Close(); err != nil {
		w.Error(err)
	}
	w.noProcesses()
	if keep || w.Failed() {
		w.Logf("captures and output of all daemons: %s", w.dir)
		w.tellErrors()
		return
	}
	if err := os.RemoveAll(w.dir); err != nil {
		w.Error(err)
	}
}

// tellErrors prints the end of what each daemon said.
func (w *world) tellErrors() {
	for _, a := range w.agents {
		b, err := os.ReadFile(a.proc.ErrFile())
		if err != nil {
			continue
		}
		if n := len(b); n > 4000 {
			b = b[n-4000:]
		}
		w.Logf("--- %s (exit: %v)\n%s", filepath.Base(a.proc.ErrFile()), a.exitError(), b)
	}
}

// until waits for a condition.
func (w *world) until(what string, ok func() bool) {
	w.Helper()
	w.within(patience, what, ok)
}

func (w *world) within(limit time.Duration, what string, ok func() bool) {
	w.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			w.Fatalf("waited %v for: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if took := time.Since(start); took > 2*time.Second { // not wrong, and worth knowing
		w.Logf("waited %.1f s for: %s", took.Seconds(), what)
	}
}

// somewhen waits a random part of d: failures come when they come.
func (w *world) somewhen(d time.Duration) {
	time.Sleep(time.Duration(w.rng.Int64N(int64(d))))
}

// must ends the test on an error of its own machinery.
func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// startRedis starts redis-server on a host, on the service's addresses, and waits
// until it answers there.
func (w *world) startRedis(h *lab.Host) *server {
	w.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		w.Skip("needs redis-server (scripts/deps.sh test)")
	}
	args := append([]string{"redis-server", "--bind"}, w.addrs()...)
	return w.serve(h, append(args, "--port", port, "--save", "", "--appendonly", "no",
		"--protected-mode", "no", "--tcp-backlog", "128", "--dir", h.Dir())...)
}

// addrs are the service's addresses alone.
func (w *world) addrs() []string {
	var a []string
	for _, v := range w.vips {
		addr, _, _ := strings.Cut(v, "/")
		a = append(a, addr)
	}
	return a
}

// server is a server that knows nothing of ftckpt.
type server struct {
	*lab.Process
	host *lab.Host
	name string         // of its program
	end  syscall.Signal // that ends it, and what it has started
}

// kill is kill -9.
func (s *server) kill(w *world) {
	w.Helper()
	w.must(s.Signal(syscall.SIGKILL))
	<-s.Done()
}

// serve starts a server and waits until it accepts connections. Its PID is
// high, as on a machine that has been up for a while.
func (w *world) serve(h *lab.Host, args ...string) *server {
	w.Helper()
	w.starts++
	p, err := h.Start(lab.Service{Name: fmt.Sprintf("server-%d", w.starts), Args: args, HighPID: true})
	w.must(err)
	s := &server{p, h, filepath.Base(args[0]), syscall.SIGKILL}
	w.servers = append(w.servers, s)
	w.until("the server accepts connections", func() bool {
		select {
		case <-p.Done():
			w.Fatalf("the server ended: %v", p.Exit())
		default:
		}
		ctx, cancel := context.WithTimeout(w.Context(), time.Second)
		defer cancel()
		c, err := h.Dial(ctx, "tcp", w.service)
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	})
	return s
}
