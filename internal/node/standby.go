package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/ready"
	"github.com/ftckpt/ftckpt/internal/roles"
	"github.com/ftckpt/ftckpt/replay"
	"github.com/ftckpt/ftckpt/replay/capsule"
	"github.com/ftckpt/ftckpt/replay/reqsk"
	"github.com/ftckpt/ftckpt/stream"
)

const (
	detectEvery = 5 * time.Millisecond
	// clientPatience is for how long a client's TCP repeats what is not acknowledged
	// (Linux gives up after 924 s, tcp_retries2): a service of which the log has
	// heard nothing for longer is brought back only if somebody says so.
	clientPatience = 15 * time.Minute
	// reopenAfter paces a log that cannot be read.
	reopenAfter = 500 * time.Millisecond
)

// standby follows a service's log until it takes over, and is then the
// service's primary.
type standby struct {
	cfg    config.Standby
	log    *slog.Logger
	out    io.Writer
	node   string
	criu   checkpoint.Criu
	hasher checkpoint.Hasher

	srv   *stream.Server // embedded log; nil when it is elsewhere
	url   string
	lg    *stream.Log
	store *stream.Store

	capsule  *capsule.Capsule
	recreate *reqsk.Recreator // nil where the kernel cannot
	way      way              // set once; with mu held: status reads it
	images   string           // directory

	translated *translations // of the capsule's connections
	leaves     bool          // the capsule outlives us
	mu         sync.Mutex
	ledger     *replay.Ledger
	local      local           // newest generation whose image is on this host
	anew       stream.Position // where the newest server began that no earlier generation leads to
	before     local           // the one before it
	fetchErr   error
	judge      *roles.Judge
	primary    *primary // after the takeover
	taking     bool
	restores   bool // it is its own primary's (see successor)
	awaited    bool // clients may be waiting since before this standby began

	news   chan struct{} // a new generation is in the log
	change chan struct{} // the ledger moved
}

// local is a generation that could be restored now.
type local struct {
	manifest checkpoint.Manifest
	gen      stream.Generation
	at       time.Time // when its record was read
	dir      string
	svc      service
	socks    []checkpoint.Socket // of the image
}

// tuples names the connections of a generation.
func (l *local) tuples() map[stream.ConnID]stream.FourTuple {
	t := make(map[stream.ConnID]stream.FourTuple, len(l.manifest.Conns))
	for _, c := range l.manifest.Conns {
		t[c.Conn] = c.Tuple
	}
	if sth, err := parseSouth(l.manifest.South); err == nil { // else the takeover says so
		for _, c := range sth.Closing {
			t[c.Conn] = c.Tuple
		}
	}
	return t
}

// Standby runs the standby, and the primary it may become, until ctx ends.
func Standby(ctx context.Context, cfg config.Standby, out io.Writer, log *slog.Logger) error {
	s := &standby{
		cfg: cfg, log: log, out: out, ledger: replay.NewLedger(),
		news: make(chan struct{}, 1), change: make(chan struct{}, 1),
	}
	raiseLimits(log)
	var err error
	if s.node, err = nodeID(cfg.StateDir); err != nil {
		return exitcode.Wrap(exitcode.Failed, err)
	}
	s.judge = roles.NewJudge(s.node, cfg.Detect, detectEvery)
	ctl, err := control.Listen(cfg.RunDir, cfg.Name, log)
	if err != nil {
		return err
	}
	defer ctl.Close()
	if s.criu, err = checkpoint.Locate(ctx, ""); err != nil {
		return exitcode.Wrap(exitcode.Unsuitable, err)
	}
	if err := s.criu.Warm(ctx); err != nil { // or the first restore is ten times slower
		log.Warn("prepare CRIU", "err", err)
	}
	if err := s.openLog(ctx); err != nil {
		return err
	}
	defer s.closeLog()
	if s.images, err = imageDir(cfg.Common, cfg.Name); err != nil {
		return err
	}
	defer os.RemoveAll(s.images)
	left, err := s.openCapsule(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.capsule.Close() }()
	open := newTranslations
	if left != nil {
		open = openTranslations
	}
	if s.translated, err = open(cfg, log); err != nil {
		if left != nil {
			s.release()
		}
		return exitcode.Wrap(exitcode.Failed, err)
	}
	defer s.endTranslations()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer answer(ctx, ctl, s, log)()
	line := "standing by"
	if s.srv != nil {
		line = "join: " + s.srv.JoinString()
	}
	if err := ready.Announce(out, line, "standing by for "+cfg.Name); err != nil {
		return err
	}
	if left != nil {
		live, err := s.wentLive(ctx)
		if err != nil {
			s.capsule.Release()
			return err
		}
		if live {
			return s.resume(ctx, left)
		}
		log.Warn("the agent before was ended in the middle of a takeover: what it had restored is of no use")
		if err := s.capsule.Close(); err != nil {
			return fmt.Errorf("end the capsule of a takeover that was cut short: %w", err)
		}
		if _, err := s.openCapsule(ctx); err != nil {
			return err
		}
	}
	if err := s.lookAtLog(ctx); err != nil {
		log.Warn("a service whose primary is gone already is not going to be taken over", "err", err)
	}
	s.openRecreator()
	defer s.closeRecreator()
	if err := s.lg.StartBeacon(ctx, roles.Standby, s.node, roles.StandbyBeatEvery, s.beat); err != nil {
		return fmt.Errorf("start heartbeat: %w", err)
	}
	if err := watchLink(ctx, "", cfg.Dev, log, s.linked); err != nil {
		return err
	}
	if err := s.lg.WatchBeats(ctx, s.heard); err != nil {
		return fmt.Errorf("listen for the primary: %w", err)
	}
	go s.follow(ctx)
	go s.fetch(ctx)
	log.Info("standing by", "service", cfg.Name, "node", s.node)
	return s.watch(ctx)
}

func (s *standby) openLog(ctx context.Context) error {
	c, embed, err := logConfig(s.cfg.Name, s.cfg.Join, s.cfg.Log)
	if err != nil {
		return err
	}
	if embed != "" {
		if s.srv, err = embedLog(s.cfg.Common, embed); err != nil {
			return err
		}
		c.Server = s.srv
		s.url = "embed://" + s.srv.Addr()
	}
	if s.lg, err = stream.Open(ctx, c); err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	if s.url == "" {
		s.url = s.lg.URL()
	}
	s.store = s.lg.Store(stream.StoreOptions{})
	return nil
}

// embedLog starts a log server in this process.
func embedLog(c config.Common, listen string) (*stream.Server, error) {
	srv, err := stream.StartServer(stream.ServerOptions{Listen: listen, StoreDir: filepath.Join(c.StateDir, "log")})
	if err != nil {
		return nil, exitcode.Wrap(exitcode.Failed, fmt.Errorf("start the embedded log: %w", err))
	}
	return srv, nil
}

func (s *standby) closeLog() {
	if s.lg != nil {
		_ = s.lg.Close()
	}
	if s.srv != nil {
		s.srv.Shutdown()
	}
}

// endTranslations leaves the list of translated connections to whoever protects
// the capsule next, if that outlives us.
func (s *standby) endTranslations() {
	if s.leaves {
		s.translated.close()
		return
	}
	s.translated.remove()
}

// follow keeps the ledger up to date for as long as ctx lives.
func (s *standby) follow(ctx context.Context) {
	from := stream.StreamSeq(0)
	for ctx.Err() == nil {
		err := s.followFrom(ctx, from)
		if ctx.Err() != nil {
			return
		}
		s.log.Error("the log cannot be followed; beginning again at the newest generation", "err", err)
		s.mu.Lock()
		s.ledger = replay.NewLedger()
		if s.local.gen.ID != 0 { // its connections may have no open record
			s.ledger.Introduce(s.local.gen, s.local.tuples())
		}
		from = s.local.gen.FromSeq
		if errors.Is(err, stream.ErrPurged) {
			from = 0
		}
		s.mu.Unlock()
		sleep(ctx, reopenAfter)
	}
}

func (s *standby) followFrom(ctx context.Context, from stream.StreamSeq) error {
	r, err := s.lg.NewReader(ctx, from)
	if err != nil {
		return fmt.Errorf("open reader: %w", err)
	}
	defer r.Close()
	for {
		e, err := r.Next(ctx)
		if err != nil {
			return err
		}
		s.apply(e)
	}
}

func (s *standby) apply(e stream.Entry) {
	s.mu.Lock()
	now := time.Now()
	s.ledger.Apply(now, e)
	if e.Fence != nil {
		s.judge.Fence(e.Fence.Node, now)
	}
	switch r := e.Rec.(type) {
	case stream.Hello:
		if svc, err := parseService(r.Config); err != nil || svc.Anew {
			s.anew = e.Pos
		}
	case stream.Generation:
		notify(s.news)
	}
	s.mu.Unlock()
	notify(s.change)
}

// fetch brings each new generation's image to this host.
func (s *standby) fetch(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.news:
		}
		for ctx.Err() == nil {
			err := s.fetchNewest(ctx)
			s.mu.Lock()
			s.fetchErr = err
			s.mu.Unlock()
			if err == nil {
				break
			}
			s.log.Warn("cannot bring the newest generation here; trying again", "err", err)
			sleep(ctx, reopenAfter)
		}
	}
}

func (s *standby) fetchNewest(ctx context.Context) error {
	s.mu.Lock()
	gen, at, have, taking := s.ledger.Gen, s.ledger.GenAt, s.local.gen.ID, s.taking
	s.mu.Unlock()
	if taking || gen.ID == 0 || gen.ID == have {
		return nil
	}
	s.mu.Lock()
	before := s.local
	s.mu.Unlock()
	loc, err := s.bring(ctx, gen, at, before)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if !s.taking {
		s.before, s.local = s.local, loc
		s.ledger.Introduce(gen, s.local.tuples())
	}
	s.mu.Unlock()
	removeAllBut(s.log, s.images, loc.dir, before.dir)
	s.log.Debug("generation is here", "generation", gen.ID, "bytes", loc.manifest.ImageBytes)
	return nil
}

// bring fetches the image of a generation whose record was read at at. What it
// shares with the one that is here already is not sent again.
func (s *standby) bring(ctx context.Context, gen stream.Generation, at time.Time, before local) (local, error) {
	var none local
	b, err := s.store.Get(ctx, gen.Manifest)
	if err != nil {
		return none, fmt.Errorf("read manifest of generation %d: %w", gen.ID, err)
	}
	m, err := checkpoint.DecodeManifest(b)
	if err != nil {
		return none, fmt.Errorf("read manifest of generation %d: %w", gen.ID, err)
	}
	sth, err := parseSouth(m.South)
	if err != nil {
		return none, err
	}
	svc, err := sth.service()
	if err != nil {
		return none, fmt.Errorf("generation %d: %w", gen.ID, err)
	}
	if err := prepareVIPs(s.capsule, svc); err != nil {
		return none, err
	}
	if err := checkpoint.VerifyFiles(m.Files, "/", &s.hasher); err != nil {
		return none, fmt.Errorf("generation %d cannot be restored on this host: %w", gen.ID, err)
	}
	dir := filepath.Join(s.images, fmt.Sprintf("gen-%d", gen.ID))
	if err := os.RemoveAll(dir); err != nil { // of a standby that was killed
		return none, fmt.Errorf("make room for generation %d: %w", gen.ID, err)
	}
	var prev *checkpoint.Local
	if before.dir != "" {
		prev = &checkpoint.Local{Dir: before.dir, Image: before.manifest.Image}
	}
	if _, err := checkpoint.Download(ctx, s.store, m.Image, dir, prev); err != nil {
		return none, fmt.Errorf("bring generation %d here: %w", gen.ID, err)
	}
	// What can be done before a takeover is not done in one.
	if _, err := checkpoint.ForgetSizes(dir); err != nil {
		return none, fmt.Errorf("prepare generation %d: %w", gen.ID, err)
	}
	socks, err := checkpoint.ReadSockets(dir)
	if err != nil {
		return none, fmt.Errorf("read generation %d: %w", gen.ID, err)
	}
	return local{manifest: m, gen: gen, at: at, dir: dir, svc: svc, socks: socks}, nil
}

// heard is called for every heartbeat.
func (s *standby) heard(b stream.Beat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.primary == nil {
		s.judge.Beat(b.Role, b.Node, b.At)
	}
}

// watch waits for a reason to take over.
func (s *standby) watch(ctx context.Context) error {
	t := time.NewTicker(detectEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.capsule.Done():
			return exitcode.Errorf(exitcode.Failed, "the capsule's init has ended; run ftckpt standby again")
		case <-t.C:
		case <-s.change:
		}
		why, since := s.reason(time.Now())
		if why == "" {
			continue
		}
		err := s.takeOver(ctx, why, since)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errStillPrimary):
			s.log.Info("another node is the primary already; following it", "err", err)
		default:
			return err
		}
	}
}

// lookAtLog finds out whether somebody may still wait for a service whose primary
// was gone before this standby began.
func (s *standby) lookAtLog(ctx context.Context) error {
	st, err := s.lg.Status(ctx)
	if err != nil {
		return fmt.Errorf("look at the log: %w", err)
	}
	s.awaited = st.Messages > 0 && st.Age < clientPatience
	return nil
}

// reason says why this node should take over now, and since when the primary
// has been silent; "" when it should not.
func (s *standby) reason(now time.Time) (why string, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.judge.Reason(now, roles.Situation{
		Epoch: s.ledger.Fence.Epoch, Usable: s.usable(), Released: s.ledger.Released, Exited: s.ledger.Exited,
		Offered: s.ledger.Heir == s.node, Awaited: s.awaited,
	})
}

// linked takes note that the link here has failed or is back.
func (s *standby) linked(up bool, _ int) {
	s.mu.Lock()
	over := s.primary != nil // which watches the link itself
	s.judge.Link(up, time.Now())
	s.mu.Unlock()
	if over {
		return
	}
	if up {
		s.log.Info("the link is back", "dev", s.cfg.Dev)
		return
	}
	s.log.Warn("the link here is down: the primary cannot be judged from here", "dev", s.cfg.Dev)
}

// usable reports whether the log leads from the generation here to the present.
// The caller holds mu.
func (s *standby) usable() bool { return s.local.gen.ID != 0 && s.local.gen.Cut >= s.anew }

func removeAllBut(log *slog.Logger, dir string, keep ...string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !strings.HasPrefix(e.Name(), "gen-") || contains(keep, path) {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			log.Warn("remove an old image", "err", err)
		}
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
