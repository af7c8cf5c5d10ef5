package node

import (
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	// tickEvery paces what can wait a little: where connections stand, and the
	// probes of a replay.
	tickEvery = 5 * time.Millisecond
	// congestedAt and calmAt bound what may wait for the log, in octets: beyond
	// the first no new client data is taken, below the second it is again.
	congestedAt = 64 << 20
	calmAt      = 32 << 20
)

// driver carries packets between a datapath and the pure machines, and their
// records to the log. It holds no protocol: it parses, asks, and does what the
// machine's Ready says, in the order Ready asks for.
type driver struct {
	log *slog.Logger
	dp  *tcpwrap.Translator

	mu      sync.Mutex
	machine *tcpwrap.Machine // nil until the connections are live here
	engine  *replay.Engine   // nil but during and just after a takeover
	writer  *stream.Writer
	dying   func() bool // of the server process, for its FIN and RST
	tree    *tree       // the processes below it; nil: unknown
	bear    func(*replay.Birth)
	busy    func() bool // the restored server is at work
	failed  func(error) // the log ended or refused a record

	unplugged atomic.Bool // the link has no carrier, or had none a moment ago
	doubt     bool

	farewells []farewell

	congested bool
	broken    bool // a record could not be appended
	malformed uint64
	corrupt   uint64
	buf       []byte

	stop chan struct{}
	done sync.WaitGroup
}

// newDriver makes a driver; t remembers which connections are translated, and is
// nil where none ever are.
func newDriver(dp tcpwrap.Datapath, t *translations, log *slog.Logger) *driver {
	var changed func(*tcpwrap.Translated, bool)
	if t != nil {
		changed = t.changed
	}
	return &driver{log: log, dp: tcpwrap.NewTranslator(dp, changed), stop: make(chan struct{}), failed: func(error) {}, dying: func() bool { return false }}
}

// start begins to move packets. Nothing passes before there is a machine or an
// engine: packets wait in the kernel.
func (d *driver) start() {
	d.done.Add(2)
	go d.receive()
	go d.tick()
}

// close ends the datapath; what it held is dropped by the kernel.
func (d *driver) close() error {
	select {
	case <-d.stop:
		return nil
	default:
	}
	close(d.stop)
	err := d.dp.Close()
	d.done.Wait()
	return err
}

// with runs f with the machines to itself and then does what they want done.
// When it returns, every verdict that was decided before is with the kernel.
func (d *driver) with(f func()) {
	d.mu.Lock()
	defer d.finish()
	f()
}

// finish ends an event: it does what the machines want done and lets go of mu.
// The kernel sends and delivers packets within the call that gives it their
// verdicts; meanwhile others may go on with the machines. The datapath keeps
// verdicts in order.
func (d *driver) finish() {
	d.carryOut()
	d.mu.Unlock()
	if err := d.dp.Flush(); err != nil && !errors.Is(err, tcpwrap.ErrClosed) {
		d.log.Error("give verdicts", "err", err)
	}
}

func (d *driver) receive() {
	defer d.done.Done()
	var packets []tcpwrap.Packet
	for {
		var err error
		packets, err = d.dp.Recv(packets[:0])
		if err != nil {
			if !errors.Is(err, tcpwrap.ErrClosed) {
				d.log.Error("the packet queue failed: nothing passes any more", "err", err)
				d.failed(err)
			}
			return
		}
		now := time.Now()
		d.mu.Lock()
		// One Ready for all of them: their data is good until the next Recv, and
		// what they have to log goes into one batch.
		for i := range packets {
			d.packet(now, &packets[i])
			if d.engine != nil {
				d.carryOut()
			}
		}
		d.finish()
	}
}

func (d *driver) packet(now time.Time, p *tcpwrap.Packet) {
	var s tcpwrap.Segment
	if p.Corrupt {
		d.corrupt++
		d.dp.Verdict(p.ID, tcpwrap.Drop)
		return
	}
	if err := tcpwrap.ParseSegment(p.Data, p.Dir, &s); err != nil {
		d.malformed++ // fail closed: what we cannot read we cannot log
		d.dp.Verdict(p.ID, tcpwrap.Drop)
		return
	}
	switch {
	case d.frozen() && d.engine != nil && d.engine.Owns(s.Tuple) && !asks(&s):
		d.dp.Verdict(p.ID, tcpwrap.Drop) // nothing may be made in a server that is being dumped
	case d.engine != nil && d.engine.Owns(s.Tuple) && d.engine.Packet(now, p.ID, &s):
	case d.machine != nil:
		ends := p.Dir == tcpwrap.Outbound && s.Flags&(tcpwrap.FIN|tcpwrap.RST) != 0
		dying := ends && d.dying()
		if ends && !dying && d.defers(now, p.ID, &s) {
			return
		}
		d.machine.Packet(now, p.ID, &s, dying)
	default:
		d.dp.Verdict(p.ID, tcpwrap.Drop)
	}
}

// asks reports whether a segment is a client's SYN: that is answered without the
// server, and one that is dropped costs the client a second.
func asks(s *tcpwrap.Segment) bool {
	return s.Dir == tcpwrap.Inbound && s.Flags&(tcpwrap.SYN|tcpwrap.ACK) == tcpwrap.SYN
}

// carryOut does what the machines want done. The caller holds mu.
func (d *driver) carryOut() {
	if d.machine != nil {
		d.perform(&d.machine.Ready)
	}
	if d.engine != nil {
		for _, t := range d.engine.Dialled { // what Ready says to them is translated already
			d.dp.Put(t)
		}
		d.engine.Dialled = d.engine.Dialled[:0]
		d.perform(&d.engine.Ready)
		for len(d.engine.Births) > 0 { // what is born at once has the next ones in its wake
			births := d.engine.Births
			d.engine.Births = nil
			for i := range births {
				d.bear(&births[i])
			}
			d.perform(&d.engine.Ready)
		}
	}
}

func (d *driver) perform(r *tcpwrap.Ready) {
	for i := range r.Records {
		if err := d.writer.Append(r.Records[i].Pos, r.Records[i].Record); err != nil {
			// A record that is not in the log breaks every promise behind it.
			d.log.Error("append to the log: nothing passes any more", "err", err)
			if d.engine != nil {
				d.engine.Doubt(true) // for good
			}
			if d.machine != nil {
				d.machine.Stop()
			}
			d.broken = true
			go d.failed(err)
			break
		}
	}
	for i := range r.Segments {
		d.send(&r.Segments[i])
	}
	for _, v := range r.Verdicts {
		d.dp.Verdict(v.ID, v.Verdict)
	}
	r.Reset()
	if d.writer == nil {
		return
	}
	_, waiting := d.writer.Backlog()
	if d.congested != (waiting > congestedAt) && (!d.congested || waiting < calmAt) {
		d.congested = !d.congested
		if d.machine != nil {
			d.machine.Congested(d.congested)
		}
		if d.engine != nil {
			d.engine.Congested(d.congested)
		}
	}
}

func (d *driver) send(o *tcpwrap.Outgoing) {
	d.buf = tcpwrap.AppendOutgoing(d.buf[:0], o)
	send := d.dp.SendOut
	if o.Up {
		send = d.dp.SendUp
	}
	if err := send(d.buf); err != nil {
		d.log.Debug("send a segment", "conn", o.Tuple, "up", o.Up, "err", err)
	}
}

// stable is the log's notice; it comes from the writer's goroutine.
func (d *driver) stable(p stream.Position) {
	d.mu.Lock()
	defer d.finish()
	now := time.Now()
	if d.machine != nil {
		d.machine.Stable(now, p)
	}
	if d.engine != nil {
		d.engine.Stable(now, p)
	}
}

func (d *driver) tick() {
	defer d.done.Done()
	every := tickEvery
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-d.stop:
			return
		case now := <-t.C:
			busy, born := d.look()
			d.mu.Lock()
			if want := d.pace(); want != every {
				every = want
				t.Reset(every)
			}
			if d.engine != nil && !d.frozen() {
				d.engine.Busy(busy, born)
				d.engine.Tick(now)
				if cuts := d.engine.Joined(); len(cuts) > 0 && d.machine != nil {
					d.machine.Adopt(cuts)
				}
				if d.machine != nil && d.engine.Remaining() == 0 {
					d.perform(&d.engine.Ready)
					d.engine = nil
				}
			}
			if d.writer != nil {
				d.doubtful(now)
			}
			if d.machine != nil {
				d.settleFarewells(now)
				d.machine.Tick()
			}
			d.finish()
		}
	}
}

// look asks whether the restored server is at work, and how many connections it
// had been given by then. That takes reading /proc: packets go on meanwhile.
func (d *driver) look() (busy bool, born int) {
	d.mu.Lock()
	ask := d.busy
	if d.engine == nil {
		ask = nil
	} else {
		born = d.engine.Born()
	}
	d.mu.Unlock()
	return ask != nil && ask(), born
}

// doubtful tells the machine whether somebody else may be the primary. The
// caller holds mu.
func (d *driver) doubtful(now time.Time) {
	if yes := d.unplugged.Load() || d.writer.State().Phase != stream.WriterOK; yes != d.doubt {
		d.doubt = yes
		if d.machine != nil {
			d.machine.Doubt(now, yes)
		}
		if d.engine != nil && !d.broken {
			d.engine.Doubt(yes)
		}
	}
}

func (d *driver) frozen() bool { return d.machine != nil && d.machine.Frozen() }

// pace is how often to tick: clients wait while there is an engine.
func (d *driver) pace() time.Duration {
	if d.engine != nil {
		return time.Millisecond
	}
	return tickEvery
}
