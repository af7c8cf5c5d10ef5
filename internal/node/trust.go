package node

import (
	"context"
	"fmt"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/stream"
)

// trust tells the store, before this tenure's first upload, which of the chunks
// that are there it may rely upon: those that every earlier primary keeps, should
// it have been stopped in the midst of a collection and go on. These keep the two
// newest generations.
func (p *primary) trust(ctx context.Context) error {
	if p.trusts.ID == 0 {
		return nil
	}
	p.mu.Lock()
	restored := p.gen
	p.mu.Unlock()
	manifests := map[stream.Hash]checkpoint.Manifest{restored.gen.Manifest: restored.manifest}
	gens := []stream.Generation{p.trusts}
	switch {
	case restored.gen.ID == p.trusts.ID:
	case restored.gen.ID+1 == p.trusts.ID:
		gens = append(gens, restored.gen)
		fallthrough
	default:
		b, err := p.store.Get(ctx, p.trusts.Manifest)
		if err != nil {
			return fmt.Errorf("read manifest of generation %d: %w", p.trusts.ID, err)
		}
		m, err := checkpoint.DecodeManifest(b)
		if err != nil {
			return fmt.Errorf("read manifest of generation %d: %w", p.trusts.ID, err)
		}
		manifests[p.trusts.Manifest] = m
	}
	live, _ := checkpoint.Live(gens, manifests) // all are there
	p.store.Trust(func(h stream.Hash) bool { return live[h] })
	if err := p.store.Learn(ctx); err != nil {
		return err
	}
	// What the store makes room for is bounded by what it has just learned, and that
	// has to be older than anybody else's fence. A record behind it, of no
	// connection, shows that it is.
	var pos stream.Position
	p.drv.with(func() { pos = p.drv.machine.Append(stream.ConnEnd{Reason: stream.EndClosed}) })
	if err := p.stableTo(ctx, pos); err != nil {
		return err
	}
	p.trusts = stream.Generation{}
	return nil
}
