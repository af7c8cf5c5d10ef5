package sim

import (
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// generation is a checkpoint with what the node puts into its manifest.
type generation struct {
	rec        stream.Generation
	socks      []*served
	cuts       []tcpwrap.Cut
	unaccepted []stream.ConnID
	dumped     time.Time
	nextConn   stream.ConnID
	chunks     checkpoint.Hashes
}

func (g *generation) tuples() map[stream.ConnID]stream.FourTuple {
	t := make(map[stream.ConnID]stream.FourTuple, len(g.cuts))
	for i := range g.cuts {
		t[g.cuts[i].Conn] = g.cuts[i].Tuple
	}
	return t
}

func (g *generation) manifest() checkpoint.Manifest {
	return checkpoint.Manifest{ID: g.rec.ID, Image: checkpoint.Image{Pack: g.chunks}}
}

func (g *generation) complete(s *storeServer) bool {
	for _, h := range g.chunks {
		if !s.has(h) {
			return false
		}
	}
	return true
}

// genStage is how far the taking of a generation has come: internal/node's
// primary.generation, one request at a time.
type genStage uint8

const (
	genFrozen  genStage = iota + 1 // packets wait, the dump runs
	genLearn                       // ask the store what it has
	genProof                       // wait until a record behind that is stable
	genChunk                       // store chunk i
	genCut                         // wait until the log has the cut
	genStore                       // store the manifest
	genSurvey                      // list the store
	genRecord                      // wait until the record is stable
	genPurge                       // purge the log
	genCollect                     // drop chunk i of the dead
)

type genJob struct {
	stage  genStage
	g      *generation
	chunk  int
	pos    stream.Position
	survey []stream.Hash // what the store had just before the record
	upTo   uint64        // its newest message then
	keep   []stream.Generation
	before stream.StreamSeq
	dead   []stream.Hash
}

// logAnswers: requests and answers of a node travel now.
func (n *node) logAnswers() bool {
	return n.runs() && n.agent && n.w.log.up && !n.cutLogUp && !n.cutLogDown
}

// beginGeneration freezes packets for a dump.
func (n *node) beginGeneration() {
	if n.role != primary || n.gen != nil || n.dying || !n.runs() || n.machine.Mode() != tcpwrap.Protecting ||
		n.log.core.State().Phase != stream.WriterOK || n.engine != nil && n.engine.Lagging() > 0 {
		return
	}
	n.w.gens++
	id := n.lastID + 1
	g := &generation{dumped: n.w.now}
	g.rec.ID, g.rec.Manifest = id, hashOf(hashManifest, n.w.gens)
	g.rec.Cut = n.machine.Freeze()
	g.chunks = checkpoint.Hashes{hashOf(hashSame, 0), hashOf(hashSome, uint64(n.w.d.n(3))), hashOf(hashOwn, n.w.gens)}
	n.gen = &genJob{stage: genFrozen, g: g}
	n.w.say("%s: generation %d: packets wait from %d on", n.name, id, g.rec.Cut)
}

// advanceGeneration does the next thing, if it can be done now.
func (n *node) advanceGeneration() bool {
	j := n.gen
	if j == nil || n.role != primary || !n.runs() || !n.agent {
		return false
	}
	switch j.stage {
	case genFrozen:
		n.dump(j)
		return true
	case genCut:
		if n.log.core.Stable() >= j.g.rec.Cut {
			j.stage = genStore
			return true
		}
		return false
	case genProof:
		if n.log.core.Stable() >= j.pos {
			n.proven = true
			j.stage = genChunk
			return true
		}
		return false
	case genRecord:
		if n.log.core.Stable() >= j.pos {
			n.counts(j)
			return true
		}
		return false
	}
	if !n.logAnswers() {
		return false
	}
	switch j.stage {
	case genLearn:
		if n.known == nil {
			n.known, n.stale, n.staleTo = map[stream.Hash]bool{}, map[stream.Hash]bool{}, n.w.store.last
			n.w.store.all(func(h stream.Hash) {
				if n.trusted == nil || n.trusted[h] {
					n.known[h] = true
				} else {
					n.stale[h] = true
				}
			})
		}
		j.stage = genChunk
		if n.trusted != nil && !n.proven { // internal/node's trust
			j.pos, j.stage = n.machine.Append(stream.ConnEnd{Reason: stream.EndClosed}), genProof
			n.carryOut()
			n.drive()
		}
	case genChunk:
		if h := j.g.chunks[j.chunk]; !n.known[h] {
			if n.stale[h] {
				n.w.store.drop(h, n.staleTo)
				delete(n.stale, h)
				return true
			}
			n.w.store.put(h)
			n.known[h] = true
		}
		if j.chunk++; j.chunk == len(j.g.chunks) {
			j.stage = genCut
		}
	case genStore:
		n.store(j)
	case genSurvey:
		j.upTo = n.w.store.last
		n.w.store.all(func(h stream.Hash) { j.survey = append(j.survey, h) })
		n.publish(j)
	case genPurge:
		n.purge(j)
	case genCollect:
		h := j.dead[0]
		n.w.store.drop(h, j.upTo)
		n.w.say("%s: drops a chunk", n.name)
		if j.dead = j.dead[1:]; len(j.dead) == 0 {
			n.gen = nil
		}
	}
	return true
}

// dump makes the image and lets packets go on.
func (n *node) dump(j *genJob) {
	g := j.g
	failed := n.w.d.chance(8)
	if !failed {
		socks, cuts := n.image()
		adopted, from := n.machine.Adopt(cuts)
		for i := range adopted {
			for k := range cuts {
				if cuts[k].Tuple == adopted[i].Tuple {
					cuts[k].Conn = adopted[i].Conn
				}
			}
		}
		g.socks, g.cuts = socks, cuts
		from = min(from, g.rec.Cut)
		for _, m := range n.machine.Missing(adopted) {
			if h := n.tcp[m.Tuple]; h != nil && !h.accepted && h.ep.State != 0 && h.ep.State != resetState {
				g.unaccepted = append(g.unaccepted, m.Conn)
				from = min(from, m.Open)
			}
		}
		if n.engine != nil {
			for _, u := range n.engine.Unanswered() {
				g.unaccepted = append(g.unaccepted, u.Conn)
				from = min(from, u.Open)
			}
		}
		g.rec.From = max(from, 1)
	}
	n.carryOut()
	g.nextConn = n.machine.NextConn()
	n.machine.Thaw(n.w.now)
	n.carryOut()
	if failed {
		n.w.say("%s: the dump fails", n.name)
		n.gen = nil
		return
	}
	n.w.say("%s: image of %d connections, needs the log from %d on", n.name, len(g.cuts), g.rec.From)
	j.stage = genLearn
}

// store puts the manifest into the store.
func (n *node) store(j *genJob) {
	seq, ok := n.log.core.SeqOf(j.g.rec.From)
	if !ok && j.g.rec.From < n.first {
		if len(n.kept) > 0 {
			seq, ok = n.kept[len(n.kept)-1].rec.FromSeq, true
		}
	}
	if !ok {
		n.w.say("%s: no batch holds position %d", n.name, j.g.rec.From)
		n.gen = nil
		return
	}
	j.g.rec.FromSeq = seq
	n.w.store.put(j.g.rec.Manifest)
	n.w.manifests[j.g.rec.Manifest] = j.g
	j.stage = genSurvey
}

// publish makes the generation count.
func (n *node) publish(j *genJob) {
	j.pos = n.machine.Append(j.g.rec)
	j.stage = genRecord
	n.carryOut()
	n.drive()
}

// counts: the record is stable.
func (n *node) counts(j *genJob) {
	n.lastID = j.g.rec.ID
	n.kept = append(n.kept, j.g)
	n.w.say("%s: generation %d is stable", n.name, n.lastID)
	var gens []stream.Generation
	for _, g := range n.kept {
		gens = append(gens, g.rec)
	}
	r := checkpoint.Retain(gens, nil, checkpoint.KeepGenerations)
	j.keep, j.before = r.Keep, r.PurgeBefore
	j.stage = genPurge
}

func (n *node) purge(j *genJob) {
	before := min(j.before, n.log.core.Newest())
	n.log.core.Trim(before)
	n.w.log.purge(before)
	n.w.say("%s: purges the log before %d", n.name, before)
	n.collect(j)
}

// collect finds out which chunks nobody needs.
func (n *node) collect(j *genJob) {
	manifests := map[stream.Hash]checkpoint.Manifest{}
	var rest []*generation
	for _, g := range n.kept {
		manifests[g.rec.Manifest] = g.manifest()
		for _, k := range j.keep {
			if k.ID == g.rec.ID {
				rest = append(rest, g)
			}
		}
	}
	live, ok := checkpoint.Live(j.keep, manifests)
	n.kept = rest
	if !ok {
		n.gen = nil
		return
	}
	for _, h := range j.survey {
		if !live[h] {
			j.dead = append(j.dead, h)
			delete(n.known, h)
		}
	}
	j.stage = genCollect
	if len(j.dead) == 0 {
		n.gen = nil
	}
}
