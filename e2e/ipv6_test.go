package e2e

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A service whose address is IPv6 survives what one with IPv4 does: under load,
// with connections that are idle, and with ones younger than the generation.
func TestIPv6(t *testing.T) {
	for _, d := range deaths {
		for i := range max(1, runs(t)/2) {
			t.Run(fmt.Sprintf("%s/%d", d.name, i), func(t *testing.T) {
				w := newWorldAt(t, service6, vip6CIDR)
				redis := w.startRedis(w.primary)
				standby := w.startStandby(w.standby, "")
				w.protect(redis.PID(), standby.join, "--interval", "1h")
				l := w.startLoad(busy)
				idle := w.dial()
				w.checkpoint(w.primary, w.standby)

				churn := w.startChurn(2)
				silent, half := w.dial(), w.dial()
				request := command("ECHO", longName("half", 500))
				w.must(half.send(request[:11]))
				w.somewhen(1500 * time.Millisecond)
				d.do(w, redis)
				died := time.Now()
				w.takenOver(w.standby, 0)
				w.check(idle.quiet(), idle.ask("still here"), silent.quiet(), silent.ask("still here"),
					half.send(request[11:]), half.expect(bulk(longName("half", 500))), w.dial().ask("a new one"))
				l.past(died)
				l.finish()
				churn.finish(died)
			})
		}
	}
}

// A service with several addresses, of both families: they move together.
func TestSeveralAddresses(t *testing.T) {
	const second, third = "10.77.0.101", "fd77::101"
	at := []string{service, service6, net.JoinHostPort(second, port), net.JoinHostPort(third, port)}
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorldAt(t, service, vipCIDR, vip6CIDR, second+"/24", third+"/64")
			redis := w.startRedis(w.primary)
			standby := w.startStandby(w.standby, "")
			w.protect(redis.PID(), standby.join, "--interval", "1h")
			var old, young []*raw
			for _, a := range at {
				k := w.connectTo(a)
				w.must(k.ask("old at " + a))
				old = append(old, k)
			}
			w.checkpoint(w.primary, w.standby)
			for _, a := range at {
				k := w.connectTo(a)
				w.must(k.ask("young at " + a))
				young = append(young, k)
			}
			d.do(w, redis)
			s := w.takenOver(w.standby, 0)
			if diff := cmp.Diff(w.vips, s.VIPs); diff != "" {
				t.Errorf("status: addresses (-want +got):\n%s", diff)
			}
			for i, a := range at {
				w.check(old[i].quiet(), old[i].ask("still at "+a), young[i].quiet(), young[i].ask("still at "+a))
				k := w.connectTo(a)
				w.check(k.ask("new at " + a))
			}
		})
	}
}
