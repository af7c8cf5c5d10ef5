package stream

import (
	"testing"
	"time"
)

const us = time.Microsecond

func TestGathering(t *testing.T) {
	feed := func(g *gathering, now time.Time, n int, took time.Duration, clients int) time.Time {
		for range n {
			now = now.Add(took)
			g.stored(now, took, clients)
		}
		return now
	}
	t.Run("a log that answers as soon as it can", func(t *testing.T) {
		var g gathering
		now := feed(&g, t0, 100, 100*us, 20)
		if g.wait(now, 0) {
			t.Errorf("waits until %v after now", g.until.Sub(now))
		}
	})
	t.Run("a log that lags", func(t *testing.T) {
		var g gathering
		now := feed(&g, t0, 1, 100*us, 20)
		now = feed(&g, now, 100, 160*us, 20)
		if d := g.until.Sub(now); d < 100*us || d > 120*us {
			t.Errorf("waits %v, the log is 60 us late", d)
		}
		if !g.wait(now, 14) || g.wait(now, 15) {
			t.Error("want a wait until three quarters of 20 clients are there")
		}
		if g.wait(g.until, 0) {
			t.Error("waits for ever")
		}
		now = feed(&g, now, 20, 50*time.Millisecond, 20)
		if d := g.until.Sub(now); d != mostGather {
			t.Errorf("waits %v, want at most %v", d, mostGather)
		}
	})
	t.Run("few clients", func(t *testing.T) {
		var g gathering
		now := feed(&g, t0, 1, 100*us, 1)
		now = feed(&g, now, 100, 500*us, fewClients-1)
		if g.wait(now, 0) {
			t.Error("a client that is as good as alone is made to wait")
		}
	})
	t.Run("clients go", func(t *testing.T) {
		var g gathering
		now := feed(&g, t0, 1, 100*us, 50)
		now = feed(&g, now, 100, 200*us, 8)
		if g.wait(now, 6) {
			t.Errorf("waits for clients that have gone (%d)", g.peak)
		}
	})
	t.Run("the log has become slower for good", func(t *testing.T) {
		var g gathering
		now := feed(&g, t0, 1, 100*us, 20)
		now = feed(&g, now, int(2*bestKept/(200*us)), 200*us, 20)
		if g.wait(now, 0) {
			t.Error("still waits for what the log could do long ago")
		}
	})
}

// laggingMachine has had one batch answered quickly, and one of n late.
func laggingMachine(t *testing.T, n int) (*machine, time.Time) {
	t.Helper()
	m := testMachine()
	now := t0
	for i, took := range []time.Duration{100 * us, 900 * us} {
		appendN(t, m, n)
		expect(t, m, now, actPublish)
		now = now.Add(took)
		m.acked(now, uint64(i), StreamSeq(11+i))
		if i == 0 {
			expect(t, m, now, actStable)
		}
	}
	return m, now
}

func TestMachineGathers(t *testing.T) {
	m, now := laggingMachine(t, 8)
	appendN(t, m, 2)
	// The notice first: it makes the clients send more.
	expect(t, m, now, actStable)
	a := expect(t, m, now, actGather)
	if d := a.until.Sub(now); d <= 0 || d > mostGather {
		t.Fatalf("gathers for %v", d)
	}
	appendN(t, m, 3)
	if a := expect(t, m, now, actGather); !a.until.After(now) {
		t.Fatal("gathers until a time that is over")
	}
	appendN(t, m, 1) // six of eight
	if b := expect(t, m, now, actPublish); b.batch.count != 6 {
		t.Fatalf("published %d records, want 6", b.batch.count)
	}
}

func TestMachineGathersNotForEver(t *testing.T) {
	m, now := laggingMachine(t, 8)
	appendN(t, m, 1)
	expect(t, m, now, actStable)
	a := expect(t, m, now, actGather)
	expect(t, m, a.until, actPublish)
}

func TestMachineGathersNoBulk(t *testing.T) {
	m, now := laggingMachine(t, 8)
	expect(t, m, now, actStable)
	if err := m.append(m.next, Bytes{Payload: make([]byte, publishFirst)}); err != nil {
		t.Fatal(err)
	}
	expect(t, m, now, actPublish)
}

func TestMachineStatesWaitForClients(t *testing.T) {
	m, now := laggingMachine(t, 8)
	expect(t, m, now, actStable)
	// Nothing is open: an idle writer waits for its fence check, not for more.
	if a := expect(t, m, now, actWait); !a.until.Equal(now.Add(idleCheck)) {
		t.Fatalf("waits until %v", a.until.Sub(now))
	}
	for range 20 { // where connections stand is no client's record
		if err := m.append(m.next, ConnState{Conn: 1}); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, m, now, actGather)
}

func TestNap(t *testing.T) {
	nap(-time.Second)
	start := time.Now()
	nap(300 * us)
	if d := time.Since(start); d < 300*us {
		t.Errorf("a nap of 300 us took %v", d)
	}
}
