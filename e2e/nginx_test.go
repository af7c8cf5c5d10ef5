package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	nginxSmall = 3000    // octets of the small file
	nginxLarge = 6 << 20 // and of the large one
)

// startNginx starts a master with two workers that serve static files, and
// answers it with its workers' process ids on the host. They run as root: for
// those of another user CRIU needs CAP_SYS_RESOURCE, which a container may lack.
func (w *world) startNginx() (master *server, workers []string) {
	w.Helper()
	bin, err := exec.LookPath("nginx")
	if err != nil {
		if bin = "/usr/sbin/nginx"; !exists(bin) {
			w.Skip("needs nginx (scripts/deps.sh test)")
		}
	}
	dir, err := os.MkdirTemp("", "ftckpt-e2e-nginx-") // where both hosts have it
	w.must(err)
	w.Cleanup(func() { _ = os.RemoveAll(dir) })
	w.must(os.Chmod(dir, 0o755))
	for name, n := range map[string]int{"small": nginxSmall, "large": nginxLarge} {
		w.must(os.WriteFile(filepath.Join(dir, name), noise(uint64(n), n), 0o644))
	}
	conf := filepath.Join(dir, "nginx.conf")
	w.must(os.WriteFile(conf, fmt.Appendf(nil, `daemon off; user root; worker_processes 2; pid %[1]s/pid; error_log stderr;
events { worker_connections 256; }
http {
	access_log off; keepalive_timeout 1h; keepalive_requests 1000000; send_timeout 1h;
	client_body_temp_path %[1]s/t1; proxy_temp_path %[1]s/t2; fastcgi_temp_path %[1]s/t3; uwsgi_temp_path %[1]s/t4; scgi_temp_path %[1]s/t5;
	server { listen %[2]s; listen [%[3]s]:%[4]s; root %[1]s; }
}
`, dir, service, vip6, port), 0o644))
	master = w.serve(w.primary, bin, "-c", conf, "-p", dir, "-e", "stderr")
	master.end = syscall.SIGTERM // the workers, too
	w.until("both workers run", func() bool {
		out, _ := w.primary.Command("cat", fmt.Sprintf("/proc/%d/task/%d/children", master.PID(), master.PID())).Output()
		workers = strings.Fields(string(out))
		return len(workers) == 2
	})
	return master, workers
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// fetch begins a GET on a keep-alive connection and answers its body's reader,
// once the header is here.
func (k *raw) fetch(path string) (io.Reader, error) {
	if err := k.send(fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: s\r\n\r\n", path)); err != nil {
		return nil, err
	}
	_ = k.c.SetReadDeadline(time.Now().Add(patience))
	res, err := http.ReadResponse(k.r, nil) //nolint:bodyclose // the body is the caller's, and ends with the connection
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.name(), err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", k.name(), res.Status)
	}
	return res.Body, nil
}

// fetchAll is a GET whose body must be the file of n bytes.
func (k *raw) fetchAll(path string, n int) error {
	body, err := k.fetch(path)
	if err != nil {
		return err
	}
	return same(body, n, 0)
}

// same compares what is read with the file of n bytes, slowed down by naps.
func same(body io.Reader, n int, nap time.Duration) error {
	want := noise(uint64(n), n)
	got := make([]byte, 32<<10)
	r := bufio.NewReader(body)
	for off := 0; off < n; {
		m, err := r.Read(got[:min(len(got), n-off)])
		if !bytes.Equal(got[:m], want[off:off+m]) {
			return fmt.Errorf("wrong bytes within the %d from %d on", m, off)
		}
		off += m
		if err != nil && off < n {
			return fmt.Errorf("after %d of %d bytes: %w", off, n, err)
		}
		time.Sleep(nap)
	}
	return nil
}

// A server of several processes with one listener: a master and its workers, which
// accept and serve. Large downloads go on through a takeover, to the last byte, and
// keep-alive connections take further requests, whichever process dies first.
func TestNginx(t *testing.T) {
	for name, die := range map[string]func(*world, *server, []string){
		"tree": func(w *world, master *server, workers []string) { // the workers before the master
			args := append([]string{"-c", `kill -9 "$@"`, "sh"}, append(workers, fmt.Sprint(master.PID()))...)
			w.must(w.primary.Command("sh", args...).Run())
			<-master.Done()
		},
		"host": func(w *world, _ *server, _ []string) { w.must(w.primary.Kill()) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorldAt(t, service, vipCIDR, vip6CIDR)
			master, workers := w.startNginx()
			standby := w.startStandby(w.standby, "")
			w.protect(master.PID(), standby.join, "--interval", "1h")
			var idle []*raw
			for range 12 { // so that both workers have some
				k := w.connect()
				w.must(k.fetchAll("/small", nginxSmall))
				idle = append(idle, k)
			}
			six := w.connectTo(service6)
			w.must(six.fetchAll("/small", nginxSmall))
			down := make(chan error, 3)
			for range cap(down) {
				k := w.connect()
				body, err := k.fetch("/large")
				w.must(err)
				_ = k.c.SetReadDeadline(time.Now().Add(2 * patience))
				go func() { down <- same(body, nginxLarge, 10*time.Millisecond) }()
			}
			w.checkpoint(w.primary, w.standby)
			w.somewhen(500 * time.Millisecond)
			die(w, master, workers)
			s := w.takenOver(w.standby, 0)
			if want := len(idle) + 1 + cap(down); s.Takeover.Connections != want {
				t.Errorf("status: %d connections carried over, want %d", s.Takeover.Connections, want)
			}
			for _, k := range append(idle, six) {
				w.check(k.quiet(), k.fetchAll("/small", nginxSmall), k.fetchAll("/large", nginxLarge))
			}
			for range cap(down) {
				w.check(<-down)
			}
			w.check(w.connect().fetchAll("/small", nginxSmall))
		})
	}
}

// One worker's death is the application's affair: its clients hear of it, the
// others do not, and the service is where it was.
func TestNginxWorkerDies(t *testing.T) {
	w := newWorldAt(t, service, vipCIDR, vip6CIDR)
	master, workers := w.startNginx()
	standby := w.startStandby(w.standby, "")
	w.protect(master.PID(), standby.join, "--interval", "1h")
	var clients []*raw
	for range 16 {
		k := w.connect()
		w.must(k.fetchAll("/small", nginxSmall))
		clients = append(clients, k)
	}
	w.must(w.primary.Command("kill", "-9", workers[0]).Run())
	survivors := 0
	for _, k := range clients {
		_ = k.c.SetReadDeadline(time.Now().Add(time.Second))
		switch _, err := k.r.Peek(1); {
		case errors.Is(err, os.ErrDeadlineExceeded): // of the other worker
			survivors++
			w.check(k.fetchAll("/small", nginxSmall))
		case !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET):
			t.Errorf("a client of the dead worker or of the other one: %v", err)
		default:
			w.must(k.c.Close())
		}
	}
	t.Logf("%d of %d clients were the other worker's", survivors, len(clients))
	w.check(w.connect().fetchAll("/small", nginxSmall)) // a new worker's, or the other's
	if s, _ := w.status(w.primary); !s.Protected {
		t.Errorf("status: not protected: %s", s.Reason)
	}
	last := w.connect()
	w.must(last.fetchAll("/small", nginxSmall))
	w.checkpoint(w.primary, w.standby)
	w.must(w.primary.Kill())
	w.takenOver(w.standby, 0)
	w.check(last.fetchAll("/small", nginxSmall))
}
