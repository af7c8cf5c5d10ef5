package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sort"
	"time"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// standbyBeat is what a standby says of itself.
type standbyBeat struct {
	Mode       string          `json:"mode"`
	Generation uint64          `json:"generation"`
	Last       stream.Position `json:"last"` // position it has read up to
	LowSpace   bool            `json:"low_space,omitempty"`
}

// primaryBeat is what a primary says of itself.
type primaryBeat struct {
	Epoch  stream.Epoch    `json:"epoch"`
	Stable stream.Position `json:"stable"`
	// TakingOver says that it is not live yet.
	TakingOver bool `json:"taking_over,omitempty"`
}

func (p *primary) beat() []byte {
	b, _ := json.Marshal(primaryBeat{Epoch: p.w.Epoch(), Stable: p.w.Stable()}) // plain data always encodes
	return b
}

// heard is called for every heartbeat.
func (p *primary) heard(b stream.Beat) {
	if b.Node == p.node {
		return
	}
	if b.Role == roles.Primary {
		p.heardOther(b)
		return
	}
	if b.Role != roles.Standby {
		return
	}
	var sb standbyBeat
	if json.Unmarshal(b.Payload, &sb) != nil {
		return
	}
	stable := p.w.Stable()
	p.mu.Lock()
	defer p.mu.Unlock()
	if sb.LowSpace {
		p.lowSpace = b.At
	}
	if _, known := p.standbys[b.Node]; !known && len(p.standbys) >= maxStandbys {
		return
	}
	lag := uint64(0)
	if sb.Last < stable {
		lag = uint64(stable - sb.Last)
	}
	p.standbys[b.Node] = control.Standby{Node: b.Node, Mode: sb.Mode, Generation: sb.Generation, LagRecords: lag}
	p.seen[b.Node] = b.At
}

// maxStandbys bounds what strangers on the log's server can make us remember.
const maxStandbys = 64

// liveStandbys are those heard of lately, in the order of their names.
func (p *primary) liveStandbys() []control.Standby {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []control.Standby
	now := time.Now()
	for node, s := range p.standbys {
		silent := now.Sub(p.seen[node])
		if silent > standbySilence {
			delete(p.standbys, node)
			delete(p.seen, node)
			continue
		}
		s.SeenUS = silent.Microseconds()
		out = append(out, s)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Node < out[j].Node })
	return out
}

func (p *primary) setRole(r control.Role) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.role = r
}

// Status implements control.Handler.
func (p *primary) Status() control.Status {
	standbys := p.liveStandbys()
	state := p.w.State()
	records, bytes := p.w.Backlog()
	var m tcpwrap.Stats
	p.drv.mu.Lock()
	if p.drv.machine != nil {
		m = p.drv.machine.Stats()
	}
	p.drv.mu.Unlock()

	p.mu.Lock()
	defer p.mu.Unlock()
	s := control.Status{
		Service: p.svc.Name, Node: p.node, PID: p.where.pid, Role: p.role, Epoch: uint64(p.w.Epoch()),
		VIPs: texts(p.svc.VIPs), Ports: p.svc.Ports, ClientNets: texts(p.svc.Clients), Connections: m.Connections, Outgoing: p.outgoing,
		Log: control.Log{
			URL: p.url, Durability: control.DurableProcess, Stable: uint64(p.w.Stable()),
			LagRecords: uint64(records), LagBytes: uint64(bytes), State: control.LogOK,
		},
		Held:       control.Held{Packets: m.Holding + m.Waiting, P50US: m.HeldP50.Microseconds(), P99US: m.HeldP99.Microseconds()},
		QueueDrops: p.drv.dp.Drops(), Translated: p.drv.dp.Len(), Standbys: standbys, Takeovers: p.takes, Takeover: p.takeover, Divergences: p.divergences, Expired: m.Expired,
	}
	if p.gen.gen.ID != 0 {
		s.Generation = control.Generation{
			ID: p.gen.gen.ID, AgeSeconds: time.Since(p.gen.at).Seconds(),
			Bytes: uint64(p.gen.manifest.ImageBytes), PauseUS: p.gen.manifest.PauseUS,
		}
	}
	if p.server != nil && p.server.Space().Low || time.Since(p.lowSpace) < 2*standbySilence {
		s.Log.State = control.LogLowSpace
	}
	if state.Phase != stream.WriterOK {
		s.Log.State = control.LogFailed
		s.Log.LagUS = time.Since(state.Since).Microseconds()
	}
	s.Reason = p.unprotected(state, standbys)
	if s.Protected = s.Reason == ""; s.Protected {
		since := p.since
		s.ProtectedSince = &since
	}
	return s
}

func texts(ps []netip.Prefix) []string {
	t := make([]string, 0, len(ps))
	for _, p := range ps {
		t = append(t, p.String())
	}
	return t
}

// unprotected says why a failure now would cost connections; "" when it would
// not. The caller holds mu.
func (p *primary) unprotected(state stream.WriterState, standbys []control.Standby) string {
	ready := false
	for _, s := range standbys {
		ready = ready || s.Generation > 0 && s.Generation+1 >= p.gen.gen.ID
	}
	switch {
	case p.role == control.RoleFenced:
		return "fenced: another node is the primary"
	case state.Phase != stream.WriterOK:
		return fmt.Sprintf("the log is not available: %v", state.Err)
	case p.gen.gen.ID == 0 && p.genErr != nil:
		return fmt.Sprintf("no generation yet: %v", p.genErr)
	case p.gen.gen.ID == 0:
		return "no generation yet"
	case len(standbys) == 0 && p.local: // this host is what the operator chose
		return ""
	case len(standbys) == 0:
		return "no standby"
	case !ready:
		return "no standby has the newest generation yet"
	}
	return ""
}

// Status implements control.Handler.
func (s *standby) Status() control.Status {
	s.mu.Lock()
	p := s.primary
	if p != nil {
		s.mu.Unlock()
		return p.Status()
	}
	defer s.mu.Unlock()
	st := control.Status{
		Service: s.cfg.Name, Node: s.node, Role: control.RoleStandby, Epoch: uint64(s.ledger.Fence.Epoch),
		Connections: s.ledger.Live(),
		Log:         control.Log{URL: s.url, Durability: control.DurableProcess, Stable: uint64(s.ledger.Last), State: control.LogOK},
	}
	st.Recreate = string(s.way)
	if s.taking {
		st.Role = control.RoleTakingOver
	}
	if s.local.gen.ID != 0 {
		svc := s.local.svc
		st.VIPs, st.Ports, st.ClientNets = texts(svc.VIPs), svc.Ports, texts(svc.Clients)
		st.Generation = control.Generation{
			ID: s.local.gen.ID, AgeSeconds: time.Since(s.local.at).Seconds(),
			Bytes: uint64(s.local.manifest.ImageBytes), PauseUS: s.local.manifest.PauseUS,
		}
	}
	if s.srv != nil && s.srv.Space().Low {
		st.Log.State = control.LogLowSpace
	}
	beating := time.Since(s.judge.HeardAt()) < standbySilence
	switch {
	case s.ledger.Fence.Epoch == 0:
		st.Reason = "no primary yet"
	case s.ledger.Released:
		st.Reason = "the primary ended protection on purpose"
	case s.fetchErr != nil:
		st.Reason = s.fetchErr.Error()
	case !s.usable():
		st.Reason = "no generation here yet"
	case !beating:
		st.Reason = "the primary is not heard of"
	}
	if st.Protected = st.Reason == ""; st.Protected {
		since := s.local.at
		st.ProtectedSince = &since
	}
	return st
}

// Checkpoint implements control.Handler.
func (s *standby) Checkpoint(ctx context.Context) (control.CheckpointResult, error) {
	s.mu.Lock()
	p := s.primary
	s.mu.Unlock()
	if p == nil {
		return control.CheckpointResult{}, errors.New("this node is a standby: ask the primary for a checkpoint")
	}
	return p.Checkpoint(ctx)
}

func (s *standby) beat() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, _ := json.Marshal(standbyBeat{
		Mode: s.cfg.Mode, Generation: s.local.gen.ID, Last: s.ledger.Last,
		LowSpace: s.srv != nil && s.srv.Space().Low,
	})
	return b
}
