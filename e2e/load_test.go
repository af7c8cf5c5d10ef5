package e2e

import (
	"encoding/json"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

// load is clients that check every byte, as a process on the client host.
type load struct {
	w     *world
	cmd   *lab.Cmd
	stdin io.WriteCloser
	want  int // connections

	mu   sync.Mutex
	last loadgen.Message

	done   chan struct{} // the output has ended
	result loadgen.Result
	err    error
	over   bool
}

// startLoad starts clients and waits until each of them had an answer.
func (w *world) startLoad(cfg loadgen.Config) *load {
	w.Helper()
	cfg.Addr, cfg.Seed = w.service, w.seed
	l := &load{w: w, cmd: w.client.Command(ftckpt, loadgen.Arg), want: cfg.Connections(), done: make(chan struct{})}
	var err error
	l.stdin, err = l.cmd.StdinPipe()
	w.must(err)
	out, err := l.cmd.StdoutPipe()
	w.must(err)
	w.must(l.cmd.Start())
	w.Cleanup(l.abort) // before the lab goes
	go func() {
		defer close(l.done)
		l.result, l.err = loadgen.Follow(out, func(m loadgen.Message) {
			l.mu.Lock()
			l.last = m
			l.mu.Unlock()
		})
		l.err = errors.Join(l.err, l.cmd.Wait())
	}()
	w.must(json.NewEncoder(l.stdin).Encode(cfg))
	l.until("all clients are connected", func(m loadgen.Message) bool { return m.Connected == l.want })
	return l
}

func (l *load) now() loadgen.Message {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// until waits for progress of the clients.
func (l *load) until(what string, ok func(loadgen.Message) bool) {
	l.w.Helper()
	l.w.until(what, func() bool {
		select {
		case <-l.done:
			l.w.Fatalf("the clients ended: %v", l.err)
		default:
		}
		return ok(l.now())
	})
}

// past waits until every connection has had an answer to something that it
// asked for after t, and some more requests were answered.
func (l *load) past(t time.Time) {
	l.w.Helper()
	l.until("every connection makes progress again", func(m loadgen.Message) bool { return m.Oldest.After(t) })
	n := l.now().Requests
	l.until("the load goes on", func(m loadgen.Message) bool { return m.Requests >= n+200 })
}

// finish stops the clients, and fails the test for one wrong byte or one lost
// connection.
func (l *load) finish() loadgen.Result {
	l.w.Helper()
	r := l.stop()
	if r.Mismatches != 0 || r.Resets != 0 || r.Requests == 0 || r.Connections != l.want {
		l.w.Errorf("clients: %d connections, %d requests, %d mismatches, %d resets", r.Connections, r.Requests, r.Mismatches, r.Resets)
		for _, c := range r.Conns {
			for _, e := range c.Errors {
				l.w.Errorf("connection %d (%s): %s", c.ID, c.Kind, e)
			}
		}
	}
	l.w.Logf("clients: %d connections, %d requests, %d bytes checked, longest wait %d ms",
		r.Connections, r.Requests, r.BytesChecked, r.StallUS/1000)
	return r
}

// stop stops the clients and returns what they saw.
func (l *load) stop() loadgen.Result {
	l.w.Helper()
	l.over = true
	l.w.must(l.stdin.Close())
	l.w.until("the end of the clients", func() bool {
		select {
		case <-l.done:
			return true
		default:
			return false
		}
	})
	l.w.must(l.err)
	return l.result
}

// abort ends clients that the test has not stopped.
func (l *load) abort() {
	if !l.over {
		_ = l.cmd.Process.Kill()
		<-l.done
	}
}
