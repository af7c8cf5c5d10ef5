package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
)

// dialFrom connects from one of the client host's addresses.
func (w *world) dialFrom(from string) *raw {
	w.Helper()
	var c net.Conn
	w.must(w.client.Do(func() (err error) {
		ctx, cancel := context.WithTimeout(w.Context(), patience)
		defer cancel()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err = d.DialContext(ctx, "tcp", w.service)
		return err
	}))
	w.Cleanup(func() { _ = c.Close() })
	return newRaw(w, c)
}

// With --client-net the connections of other clients pass unlogged and unheld. At
// a takeover they end with a reset, for the server too, while the others survive;
// new ones work.
func TestClientNet(t *testing.T) {
	const ours, other = "10.77.0.2", "10.77.0.99"
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorldAt(t, service, vipCIDR, vip6CIDR)
			w.must(w.client.AddAddr(other + "/24"))
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "")
			protect := w.protect(redis.PID(), standby.join, "--interval", "1h", "--client-net", "10.77.0.0/28", "--client-net", "fd77::/64")
			mine, stranger, quiet := w.dialFrom(ours), w.dialFrom(other), w.dialFrom(other)
			w.must(errors.Join(mine.ask("mine"), stranger.ask("not mine"), quiet.ask("not mine either")))
			w.checkpoint(w.primary, w.standby)
			young := w.dialFrom(other)
			w.must(young.ask("young"))

			before := w.untilStatus(w.primary, "all is stable", func(s control.Status) bool { return s.Log.LagRecords == 0 && s.Connections == 1 })
			for range 50 {
				w.must(errors.Join(stranger.ask("unlogged"), young.ask("unlogged")))
			}
			// Ten times as long as the machine waits before it logs where connections stand.
			time.Sleep(10 * 5 * time.Millisecond)
			after, _ := w.status(w.primary)
			if after.Log.Stable != before.Log.Stable || after.Log.LagRecords != 0 || after.Connections != 1 {
				t.Errorf("the log has grown from %d to %d (%d more under way), with %d connections: clients outside --client-net were logged",
					before.Log.Stable, after.Log.Stable, after.Log.LagRecords, after.Connections)
			}
			w.must(protect.proc.Signal(syscall.SIGSTOP)) // nobody gives verdicts
			w.check(stranger.ask("unheld"))
			w.must(protect.proc.Signal(syscall.SIGCONT))
			w.must(mine.ask("held for a moment"))

			d.do(w, redis)
			s := w.takenOver(w.standby, 0)
			if s.Takeover.Connections != 1 || strings.Join(s.ClientNets, " ") != "10.77.0.0/28 fd77::/64" {
				t.Errorf("status: %d connections carried over, client nets %q", s.Takeover.Connections, s.ClientNets)
			}
			w.check(mine.quiet(), mine.ask("still mine"))
			for name, k := range map[string]*raw{"spoke before": stranger, "silent": quiet, "young": young} {
				if d.name == "process" && name != "young" { // these were told by the dying server
					continue
				}
				_ = k.c.SetReadDeadline(time.Now().Add(5 * time.Second)) // before a keep-alive probe would tell
				var spoke error
				if name == "young" { // of whom nobody knows: it learns it when it speaks
					spoke = k.send(command("PING"))
				}
				n, err := k.r.Read(make([]byte, 64))
				err = errors.Join(spoke, err)
				ended := errors.Is(err, syscall.ECONNRESET) || d.name == "process" && errors.Is(err, io.EOF)
				if n != 0 || !ended {
					t.Errorf("a client outside --client-net (%s) read %d bytes and %v, want a reset", name, n, err)
				}
			}
			fresh := w.dialFrom(other)
			w.check(fresh.ask("works"), fresh.ask("and goes on"))
			// The restored server has let go of those it had.
			w.until("the restored server has only its present clients", func() bool {
				out, err := w.client.Command("redis-cli", "-h", vip, "CLIENT", "LIST").Output()
				w.must(err)
				return strings.Contains(string(out), "addr="+fresh.name()) && strings.Contains(string(out), "addr="+mine.name()) &&
					!strings.Contains(string(out), "addr="+stranger.name()) && !strings.Contains(string(out), "addr="+quiet.name())
			})
		})
	}
}
