package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/ftckpt/ftckpt/checkpoint"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/stream"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

// translations remember which connections of a capsule are translated, and how,
// in a file beside the capsule's own: the agent may die and the capsule live on.
// A file in the run directory is enough, since host and capsule die together. A
// nil one remembers nothing.
type translations struct {
	path string
	log  *slog.Logger
	file *os.File
	now  map[stream.FourTuple]tcpwrap.Translated // when opened
}

// maxTranslations bounds what is read of the file.
const maxTranslations = 64 << 20

// translationLine is one of the file's.
type translationLine struct {
	tcpwrap.Translated
	There bool `json:"there"`
}

func translationsPath(cfg config.Standby) string {
	return filepath.Join(cfg.RunDir, "capsule-"+cfg.Name+".translated.json")
}

// newTranslations begins anew.
func newTranslations(cfg config.Standby, log *slog.Logger) (*translations, error) {
	t := &translations{path: translationsPath(cfg), log: log}
	var err error
	if t.file, err = os.OpenFile(t.path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, fmt.Errorf("remember translated connections: %w", err)
	}
	return t, nil
}

// openTranslations goes on with what an earlier agent left. A line that was cut
// short is of a connection that was not translated yet.
func openTranslations(cfg config.Standby, log *slog.Logger) (*translations, error) {
	t := &translations{path: translationsPath(cfg), log: log, now: map[stream.FourTuple]tcpwrap.Translated{}}
	var err error
	if t.file, err = os.OpenFile(t.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		return nil, fmt.Errorf("read translated connections: %w", err)
	}
	st, err := t.file.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() > maxTranslations) {
		err = fmt.Errorf("%s is no file of ours: remove it", t.path)
	}
	if err != nil {
		t.close()
		return nil, fmt.Errorf("read translated connections: %w", err)
	}
	b := make([]byte, st.Size())
	if _, err := t.file.ReadAt(b, 0); err != nil {
		t.close()
		return nil, fmt.Errorf("read translated connections: %w", err)
	}
	for line := range bytes.Lines(b) {
		var l translationLine
		if json.Unmarshal(line, &l) != nil || !l.Tuple.Server.IsValid() || !l.Tuple.Client.IsValid() || checkTranslation(l.Translation) != nil {
			continue
		}
		if delete(t.now, l.Tuple); l.There {
			t.now[l.Tuple] = l.Translated
		}
	}
	if n := len(b); n > 0 && b[n-1] != '\n' {
		_, _ = t.file.Write([]byte("\n")) // what follows must not be lost with it
	}
	return t, nil
}

// putInto tells a translator what was remembered.
func (t *translations) putInto(tr *tcpwrap.Translator) {
	if t == nil {
		return
	}
	now := t.now
	t.now = nil
	for _, e := range now {
		tr.Put(e)
	}
}

// changed is called before a connection is translated, and when it no longer is.
func (t *translations) changed(e *tcpwrap.Translated, there bool) {
	b, _ := json.Marshal(translationLine{*e, there}) // plain data always encodes
	if _, err := t.file.Write(append(b, '\n')); err != nil {
		t.log.Error("remember a translated connection: it is lost when this agent dies", "conn", e.Tuple, "err", err)
	}
}

// close keeps the file for a successor, remove does not.
func (t *translations) close() {
	if t != nil {
		_ = t.file.Close()
	}
}

func (t *translations) remove() {
	if t == nil {
		return
	}
	t.close()
	if err := os.Remove(t.path); err != nil && !os.IsNotExist(err) {
		t.log.Warn("remove the list of translated connections", "err", err)
	}
}

// checkTranslation reads a translation without trust.
func checkTranslation(t tcpwrap.Translation) error {
	if m := max(t.Rcv.Wire, t.Rcv.TCP, t.Snd.Wire, t.Snd.TCP); m > 14 {
		return fmt.Errorf("window scale %d", m)
	}
	return nil
}

// patchTranslated gives a connection's socket in an image the numbers that its
// client has: once restored, nothing but a port is left to translate. s is as in
// the image. It answers the socket as it will be.
func patchTranslated(s checkpoint.Socket, t tcpwrap.Translation, p *checkpoint.SocketPatch) checkpoint.Socket {
	s.WriteSeq = s.WriteSeq.Add(t.Seq)
	s.SndNxt, s.SndUna = s.SndNxt.Add(t.Seq), s.SndUna.Add(t.Seq)
	seq := s.WriteSeq
	p.WriteSeq = &seq
	if s.Options&checkpoint.OptTimestamps != 0 {
		s.Timestamp = (s.Timestamp+t.TS)&^1 | s.Timestamp&1 // whose lowest bit is none of the clock's
	}
	if t.Rcv.Wire != t.Rcv.TCP || t.Snd.Wire != t.Snd.TCP {
		s.RcvWScale, s.SndWScale = t.Rcv.Wire, t.Snd.Wire
		s.Options |= checkpoint.OptWScale
		p.Scales = &checkpoint.Scales{Snd: t.Snd.Wire, Rcv: t.Rcv.Wire}
	}
	s.Tuple = t.Tuple(s.Tuple)
	return s
}

// sweepTranslated lets go of the translated connections that TCP no longer has.
func (p *primary) sweepTranslated() {
	if p.drv.dp.Len() == 0 {
		return
	}
	err := p.drv.dp.Sweep(func() (map[stream.FourTuple]bool, error) {
		socks, err := tcpwrap.Sockets(p.where.netns, p.svc.addrs(), p.svc.Ports, p.svc.Outgoing...)
		there := make(map[stream.FourTuple]bool, len(socks))
		for _, s := range socks {
			there[stream.FourTuple{Server: s.Local, Client: s.Remote}] = true
		}
		return there, err
	})
	if err != nil {
		p.log.Debug("look for translated connections", "err", err)
	}
}

// translatedOf are those of an image's connections that are translated.
func translatedOf(conns []checkpoint.ConnCut, get func(stream.FourTuple) (tcpwrap.Translation, bool)) map[stream.ConnID]tcpwrap.Translation {
	m := map[stream.ConnID]tcpwrap.Translation{}
	for _, c := range conns {
		if t, yes := get(c.Tuple); yes {
			m[c.Conn] = t
		}
	}
	return m
}
