package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/stream"
)

const (
	// heirTime is how long a standby may take to bring the newest generation to
	// its host, and succeedTime how long it may take to fence us then: clients
	// wait for that one.
	heirTime    = 5 * time.Minute
	succeedTime = 3 * time.Second
	// liveTime is how long the command waits for news of a node that has fenced
	// us: nothing here depends on it any more.
	liveTime = 60 * time.Second
)

// move is a request for a planned move.
type move struct {
	req    control.FailoverRequest
	answer chan<- moved
}

type moved struct {
	res control.FailoverResult
	err error
}

// Failover implements control.Handler.
func (p *primary) Failover(ctx context.Context, req control.FailoverRequest) (control.FailoverResult, error) {
	answer := make(chan moved, 1)
	select {
	case p.moves <- move{req, answer}:
	case <-p.exited:
		return control.FailoverResult{}, errServerGone
	case <-ctx.Done():
		return control.FailoverResult{}, ctx.Err()
	}
	a := <-answer // it ends with the daemon, and then there is something to tell
	return a.res, a.err
}

// handOver moves the service to a standby with nothing lost and as short a
// stall as there can be: the standby begins with a generation of a moment ago,
// and its takeover is the one of a failure but for the suspicion. Clients are
// held, not refused, until the standby has fenced us; if it does not, they go
// on here.
func (p *primary) handOver(ctx context.Context, req control.FailoverRequest) moved {
	res := control.FailoverResult{DryRun: req.DryRun}
	heir, err := p.chooseHeir(req.To)
	if err != nil {
		return moved{res, err}
	}
	res.To = heir.Node
	p.mu.Lock()
	res.Generation = p.gen.gen.ID
	p.mu.Unlock()
	if req.DryRun {
		return moved{res, nil}
	}
	g, err := p.generation(ctx)
	if err != nil {
		return moved{res, fmt.Errorf("the service stays here: %w", err)}
	}
	res.Generation = g.ID
	if err := p.awaitHeir(ctx, res.To, g.ID); err != nil {
		return moved{res, fmt.Errorf("the service stays here: %w", err)}
	}
	p.log.Info("handing over", "event", "handover", "to", res.To, "generation", g.ID)
	held := time.Now()
	if err := p.offer(ctx, res.To); err != nil {
		return moved{res, err}
	}
	select {
	case b := <-p.succeeded:
		res.StallUS = b.At.Sub(held).Microseconds()
		return moved{res, nil}
	case <-time.After(liveTime):
		return moved{res, fmt.Errorf("%s has taken over, but was not heard of within %v: see ftckpt status there", res.To, liveTime)}
	case <-ctx.Done():
		return moved{res, fmt.Errorf("%s has taken over; this daemon ended before it was live: %w", res.To, ctx.Err())}
	}
}

// chooseHeir finds the standby that a move goes to, or says why there is none.
func (p *primary) chooseHeir(want string) (control.Standby, error) {
	var best control.Standby
	standbys := p.liveStandbys()
	if st := p.w.State(); st.Phase != stream.WriterOK {
		return best, fmt.Errorf("cannot move the service: the log is not available: %w", st.Err)
	}
	for _, s := range standbys {
		if want != "" && s.Node != want {
			continue
		}
		if best.Node == "" || s.Generation > best.Generation || s.Generation == best.Generation && s.LagRecords < best.LagRecords {
			best = s
		}
	}
	switch {
	case best.Node != "" && best.Generation == 0:
		return best, fmt.Errorf("cannot move the service: standby %s has no generation yet (ftckpt status there says why)", best.Node)
	case best.Node != "":
		return best, nil
	case want != "" && len(standbys) > 0:
		return best, fmt.Errorf("cannot move the service: no standby %q; there is %s", want, standbys[0].Node)
	}
	return best, errors.New("cannot move the service: no standby is there (start ftckpt standby on another host)")
}

// awaitHeir waits until a standby has a generation on its host.
func (p *primary) awaitHeir(ctx context.Context, node string, id uint64) error {
	for end := time.Now().Add(heirTime); ; sleep(ctx, roles.BeatEvery) {
		found := false
		for _, s := range p.liveStandbys() {
			if s.Node != node {
				continue
			}
			if found = true; s.Generation >= id {
				return nil
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case !found:
			return fmt.Errorf("standby %s is no longer heard of", node)
		case time.Now().After(end):
			return fmt.Errorf("standby %s did not bring generation %d to its host within %v", node, id, heirTime)
		}
	}
}

// offer holds everything back and tells a standby to take over. It returns nil
// when that has fenced us. Until then the service is ours: an offer that is not
// taken up is taken back, and the fence decides if both happen at once.
func (p *primary) offer(ctx context.Context, node string) error {
	p.setHeir(node)
	p.drv.with(func() { p.drv.machine.Freeze() })
	octx, cancel := context.WithTimeout(ctx, succeedTime)
	err := p.offerUntilFenced(octx, node)
	cancel()
	if errors.Is(err, stream.ErrFenced) {
		return nil
	}
	var pos stream.Position
	p.drv.with(func() { pos = p.drv.machine.Append(stream.Handover{}) })
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), partingTime)
	defer cancel()
	switch rerr := p.stableTo(rctx, pos); {
	case errors.Is(rerr, stream.ErrFenced):
		return nil // it has, at the last moment
	case rerr != nil:
		err = errors.Join(err, rerr) // whoever ends the doubt about the log lets go
	}
	p.setHeir("")
	p.drv.with(func() { p.drv.machine.Thaw(time.Now()) })
	return fmt.Errorf("the service stays here: standby %s has not taken over: %w", node, err)
}

// offerUntilFenced repeats the offer, which is no more than an append to a
// standby that has seen it, until the append is refused: that is how we learn of
// our end at once, and can leave this host before clients look for the other.
func (p *primary) offerUntilFenced(ctx context.Context, node string) error {
	for ; ctx.Err() == nil; sleep(ctx, roles.BeatEvery) {
		var pos stream.Position
		p.drv.with(func() { pos = p.drv.machine.Append(stream.Handover{Node: node}) })
		if err := p.stableTo(ctx, pos); err != nil {
			return err
		}
	}
	return fmt.Errorf("no answer within %v", succeedTime)
}

// heardOther is called for heartbeats of another primary. They are a hint: that
// we were replaced is for the log to say, so it is asked.
func (p *primary) heardOther(b stream.Beat) {
	var pb primaryBeat
	if json.Unmarshal(b.Payload, &pb) != nil || pb.Epoch <= p.w.Epoch() || pb.TakingOver {
		return
	}
	select {
	case p.succeeded <- b:
	default:
	}
}

func (p *primary) setHeir(node string) {
	p.mu.Lock()
	p.heir = node
	p.mu.Unlock()
}

// offered is the node that this primary has offered the service to.
func (p *primary) offered() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.heir
}

// Failover implements control.Handler.
func (s *standby) Failover(ctx context.Context, req control.FailoverRequest) (control.FailoverResult, error) {
	s.mu.Lock()
	p, owner := s.primary, s.ledger.Fence.Node
	s.mu.Unlock()
	if p == nil {
		return control.FailoverResult{}, fmt.Errorf("this node is a standby: ask the primary, %s", owner)
	}
	return p.Failover(ctx, req)
}
