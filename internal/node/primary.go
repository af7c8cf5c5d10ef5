package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/pace"
	"github.com/ftckpt/ftckpt/internal/ready"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	// standbySilence is how long a standby may be silent before it no longer
	// counts as one.
	standbySilence = time.Second
	// partingTime is how long the end of protection may wait for the log.
	partingTime = 10 * time.Second
	// lingerTime is how long the sockets of a server that ended by itself may take
	// to say goodbye before their capsule ends with them.
	lingerTime = 10 * time.Second
	// lookEvery is how often the machine is asked whether it wants a generation.
	lookEvery = 500 * time.Millisecond
)

// primary protects a service on this host for one epoch. It is made by Protect
// for a server that runs already, and by a takeover for one just restored.
type primary struct {
	log   *slog.Logger
	out   io.Writer
	node  string
	svc   service
	where place

	lg    *stream.Log
	w     *stream.Writer
	store *stream.Store
	drv   *driver
	rules *tcpwrap.Rules
	criu  checkpoint.Criu
	dir   string // images
	url   string // of the log, for people

	hasher checkpoint.Hasher

	translated *translations  // of the capsule; nil outside of one
	server     *stream.Server // embedded log, nil when it is elsewhere

	nextConn  stream.ConnID     // identity of this epoch's first new connection
	lastID    uint64            // number of the newest generation, whoever took it
	cutLogged uint64            // client octets logged by the cut of the one under way
	trusts    stream.Generation // newest of the epochs before; its chunks may be relied upon. ID 0: settled
	survey    *stream.Survey    // of the store, just before the newest generation's record
	first     stream.Position   // first record of this epoch

	exited <-chan struct{} // the server process is gone
	life   func() tcpwrap.Life
	ended  chan error  // the log or the queue ended
	wanted chan wanted // generations on request
	moves  chan move   // planned moves on request

	mu       sync.Mutex
	gen      taken
	kept     []taken // newest last, gen included
	genErr   error   // why the newest attempt failed
	since    time.Time
	standbys map[string]control.Standby
	seen     map[string]time.Time
	role     control.Role
	takeover *control.Takeover
	takes    int
	outgoing *control.Outgoing // at the newest generation
	warned   map[string]bool   // remedies that were told

	lowSpace    time.Time // when a standby last said that its log is low on space
	divergences uint64    // connections on which the restored server said something else
	spared      bool      // run has ended and the server lives on

	local        bool             // a server that dies is restored on this host
	beating      bool             // its heartbeats are sent since the takeover
	fencedServer string           // config.FencedStop and so on: what becomes of it once it is replaced
	moving       sync.WaitGroup   // a planned move is under way
	heir         string           // node that was offered the service
	succeeded    chan stream.Beat // heartbeats of a primary after us
}

// newPrimary makes p, whose parts the caller has given, ready to run.
func newPrimary(p *primary) *primary {
	p.ended, p.wanted = make(chan error, 1), make(chan wanted)
	p.moves, p.succeeded = make(chan move), make(chan stream.Beat, 1)
	p.standbys, p.seen = map[string]control.Standby{}, map[string]time.Time{}
	p.warned = map[string]bool{}
	p.role = control.RolePrimary
	return p
}

// place is where the server runs.
type place struct {
	pid     int
	initPID int    // the capsule's init, 0 when the server is not in one
	netns   string // "" for this process's own
	dev     string // that the address is on
	leave   func() error
}

// wanted is a request for a generation.
type wanted struct {
	answer chan<- generationAnswer
}

type generationAnswer struct {
	res control.CheckpointResult
	err error
}

// run protects until ctx ends (nil, the server goes on), this node is fenced
// (exitcode.Fenced), or protection fails.
func (p *primary) run(ctx context.Context) error {
	p.w.OnEnd(func(err error) { p.end(err) })
	if !p.beating {
		go insist(ctx, p.log, "start heartbeat", func() error {
			return p.lg.StartBeacon(ctx, roles.Primary, p.node, roles.BeatEvery, p.beat)
		})
	}
	go insist(ctx, p.log, "listen for standbys", func() error { return p.lg.WatchBeats(ctx, p.heard) })
	wctx, unwatch := context.WithCancel(ctx)
	defer unwatch()
	if err := p.watchCarrier(wctx); err != nil {
		p.log.Warn("without it, packets may wait in this host for a link that is down", "err", err)
	}
	idle := p.generationsUntil(ctx)

	select {
	case <-ctx.Done():
		<-idle // a dump under way is called off first; CRIU lets go of the server
		return p.part()
	case <-p.exited:
		if p.life() == tcpwrap.Ended {
			<-idle
			return p.serverEnded()
		}
		return p.serverGone()
	case err := <-p.ended:
		if roles.AfterEnd(err) == roles.Leave {
			err := p.fenced()
			p.moving.Wait() // whoever asked for a handover is told how it ended
			return err
		}
		// The south side has stopped; nothing of the service leaves. A standby
		// takes over as for a dead host.
		return p.failClosed(err)
	}
}

// insist does something until it succeeds or ctx ends. What clients depend on is
// live by now: no failure of what stands beside it may end that.
func insist(ctx context.Context, log *slog.Logger, what string, do func() error) {
	for {
		err := do()
		if err == nil || ctx.Err() != nil {
			return
		}
		log.Warn(what+"; trying again", "err", err)
		sleep(ctx, reopenAfter)
	}
}

// end tells run, once, that the log or the packet queue has ended.
func (p *primary) end(err error) {
	p.drv.with(func() { p.drv.machine.Stop() })
	select {
	case p.ended <- err:
	default:
	}
}

// generationsUntil takes the first generation at once, then as the pacer says and
// on request, in the background until ctx, the server or the log ends; the
// channel it answers is closed when that has happened.
func (p *primary) generationsUntil(ctx context.Context) (ended <-chan struct{}) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		pacer := pace.New(p.svc.plan(), time.Now())
		next := time.NewTimer(0)
		defer next.Stop()
		var room pressure
		look := time.NewTicker(lookEvery)
		defer look.Stop()
		announced := false
		for {
			var answer chan<- generationAnswer
			select {
			case <-ctx.Done():
				return
			case <-p.exited:
				return
			case req := <-p.wanted:
				answer = req.answer
			case m := <-p.moves:
				p.moving.Add(1)
				m.answer <- p.handOver(ctx, m.req)
				p.moving.Done()
				continue
			case <-next.C:
				if due, _ := pacer.Due(time.Now(), p.behind()); !due {
					arm(next, pacer.Next())
					continue
				}
			case <-look.C:
				p.expireIdle(time.Now())
				_, why := pacer.Due(time.Now(), p.behind())
				if why == "" {
					why = room.urgent(ctx, p, time.Now())
				}
				if why == "" {
					arm(next, pacer.Next())
					continue
				}
				p.log.Warn("taking a generation before its time", "why", why)
			}
			res, err := p.generation(ctx)
			pacer.Taken(time.Now(), err)
			arm(next, pacer.Next())
			if answer != nil {
				answer <- generationAnswer{res, err}
			}
			switch {
			case err == nil && !announced:
				announced = true
				if err := ready.Announce(p.out, "protected", fmt.Sprintf("protecting pid %d as %s", p.where.pid, p.svc.vips())); err != nil {
					p.log.Warn("announce readiness", "err", err)
				}
			case err != nil:
				if ctx.Err() == nil && !errors.Is(err, stream.ErrFenced) {
					p.log.Error("no new generation: the server runs on, protected by the one before", "err", err, "retry_at", pacer.Next())
				}
			}
		}
	}()
	return done
}

// arm sets a timer; a zero time stops it.
func arm(t *time.Timer, at time.Time) {
	if at.IsZero() {
		t.Stop()
		return
	}
	t.Reset(time.Until(at))
}

// behind is what a recovery would have to replay now.
func (p *primary) behind() pace.Log {
	var logged uint64
	p.drv.with(func() { logged = p.drv.machine.Stats().LoggedBytes })
	next := p.w.Next()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gen.gen.ID == 0 {
		return pace.Log{Changed: true}
	}
	// The record after the cut is the generation's own.
	return pace.Log{Records: uint64(next - p.gen.gen.Cut), Octets: logged - p.gen.logged, Changed: next > p.gen.gen.Cut+2}
}

func (p *primary) wantsGeneration() (yes bool) {
	p.drv.with(func() { yes = p.drv.machine.WantGeneration() })
	return yes
}

// part ends protection on purpose: the server and its connections go on.
func (p *primary) part() error {
	_ = ready.Stopping()
	p.log.Info("ending protection; the server and its connections go on")
	p.drv.with(func() { p.drv.machine.Append(stream.Goodbye{}) })
	ctx, cancel := context.WithTimeout(context.Background(), partingTime)
	defer cancel()
	derr := p.w.Drain(ctx)
	switch roles.AfterGoodbye(derr) {
	case roles.Leave:
		return p.fenced()
	case roles.Close:
		// Without the log nobody can tell whether a standby has taken over.
		return p.failClosed(fmt.Errorf("end protection: the log does not answer, and a standby may have taken over: %w", derr))
	}
	p.drv.with(func() { p.drv.machine.Detach() })
	err := p.rules.Remove()
	if cerr := p.drv.close(); err == nil {
		err = cerr
	}
	_ = p.w.Close()
	p.spared = true
	if err != nil {
		return fmt.Errorf("end protection: %w", err)
	}
	return nil
}

// serverEnded is the end of a server that exited by itself, with status 0: that is
// an end its users wanted, and no standby must undo it. Clients see what the
// server's TCP says, as without protection.
func (p *primary) serverEnded() error {
	p.log.Info("the server has ended by itself (exit status 0): protection ends with it, and no standby takes over", "pid", p.where.pid, "event", "server-end")
	if err := p.part(); err != nil {
		return err
	}
	if p.where.initPID == 0 {
		return nil
	}
	p.awaitFarewell()
	p.spared = false // there is nobody in the capsule any more
	return nil
}

// awaitFarewell gives the sockets that a server left the time to say goodbye.
func (p *primary) awaitFarewell() {
	for end := time.Now().Add(lingerTime); time.Now().Before(end); sleep(context.Background(), lookEvery/10) {
		socks, err := tcpwrap.Sockets(p.where.netns, p.svc.addrs(), p.svc.Ports)
		if err != nil {
			p.log.Warn("look for sockets that are still open", "err", err)
			return
		}
		if !anyOpen(socks) {
			return
		}
	}
}

// anyOpen reports whether a socket still has something to say.
func anyOpen(socks []tcpwrap.Socket) bool {
	for _, s := range socks {
		if checkpoint.TCPState(s.State) != checkpoint.TimeWait {
			return true
		}
	}
	return false
}

// serverGone makes way for a standby after the server process has died on a
// living host: the log says so at once, the address leaves this host, and
// nothing of the dead server's sockets reaches a client.
func (p *primary) serverGone() error {
	died := time.Now()
	p.log.Error("the server process is gone", "pid", p.where.pid, "event", "server-exit", "time", died.Format(time.RFC3339Nano))
	p.drv.with(func() {
		p.drv.machine.Stop()
		if p.local {
			p.drv.machine.Append(stream.Handover{Node: p.node}) // other standbys leave it to us
		} else {
			p.drv.machine.Append(stream.ServerExit{})
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), partingTime)
	defer cancel()
	err := p.w.Drain(ctx)
	if !errors.Is(err, stream.ErrFenced) && err != nil {
		p.log.Warn("the log does not take the news; a standby will notice the silence", "err", err)
	}
	if p.local && !errors.Is(err, stream.ErrFenced) {
		return p.leaveHost(errServerDied)
	}
	if len(p.liveStandbys()) == 0 && err == nil {
		p.log.Error("no standby is there to take over; its clients will be reset when the address is removed or the rules are")
	}
	return p.leaveHost(exitcode.Errorf(exitcode.Failed, "the server process (pid %d) is gone; a standby takes over", p.where.pid))
}

// fenced is the end of a primary that another node has replaced.
func (p *primary) fenced() error {
	p.drv.with(func() { p.drv.machine.Stop() })
	p.setRole(control.RoleFenced)
	if heir := p.offered(); heir != "" {
		p.log.Info("handed over: nothing of this server leaves any more", "to", heir, "epoch", p.w.Epoch())
		return p.leaveHost(nil)
	}
	p.log.Error("fenced: another node is the primary; nothing of this server leaves any more", "epoch", p.w.Epoch())
	return p.leaveHost(exitcode.Errorf(exitcode.Fenced, "fenced: another node has taken over epoch %d", p.w.Epoch()))
}

// leaveHost takes the service's address and sockets off this host, silently,
// and only then the rules that kept it silent.
func (p *primary) leaveHost(why error) error {
	steps := []struct {
		what string
		do   func() error
	}{
		{"block the service", p.rules.Block},
		{"remove the address", p.where.leave},
		{"destroy the service's sockets", p.destroySockets},
		{"end the server", p.endServer},
		{"remove the rules", p.rules.Remove},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			// Whatever is left is left closed: rules that stay keep dropping.
			p.log.Error("leave the host: "+s.what, "err", err)
			break
		}
	}
	if p.drv != nil { // it was the primary in this process
		_ = p.drv.close()
		_ = p.w.Close()
	}
	return why
}

func (p *primary) destroySockets() error {
	_, err := tcpwrap.DestroySockets(p.where.netns, p.svc.addrs(), p.svc.Ports, p.svc.Outgoing...)
	return err
}

// failClosed leaves the rules in place: they drop everything of the service
// until the next ftckpt protect of this service cleans up.
func (p *primary) failClosed(err error) error {
	p.drv.with(func() { p.drv.machine.Stop() })
	if berr := p.rules.Block(); berr != nil {
		p.log.Error("block the service", "err", berr)
	}
	_ = p.drv.close()
	_ = p.w.Close()
	p.spared = true
	return fmt.Errorf("%w; nothing of the service leaves this host until ftckpt protect is run again", err)
}
