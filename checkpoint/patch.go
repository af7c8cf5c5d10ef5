package checkpoint

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	tcpstream "github.com/checkpoint-restore/go-criu/v7/crit/images/tcp-stream"
	"google.golang.org/protobuf/proto"

	"github.com/ftckpt/ftckpt/internal/seqnum"
)

// SocketPatch is what to change of one connection before it is restored.
type SocketPatch struct {
	// Timestamp is the TSval clock to go on with. CRIU restores the clock of the
	// dump, and then the client discards everything as old (PAWS, RFC 7323
	// section 5): give the last TSval that was sent, plus the time passed, plus
	// a margin. Ignored where the connection has no timestamps.
	Timestamp *uint32
	// WriteSeq gives the server's side other sequence numbers: it is what
	// Socket.WriteSeq is to be, and all the others move with it.
	WriteSeq *seqnum.Value
	// Scales are what the shift counts of the windows are to be (RFC 7323).
	Scales *Scales
}

// Scales are the shift counts of a connection's windows: Snd of those that the
// peer sends, Rcv of one's own.
type Scales struct{ Snd, Rcv uint8 }

// PatchSockets rewrites the connections of the image in dir for a restore. socks
// are those that ReadSockets found in it; the keys of patches are Socket.Inode,
// and one that is not among socks is an error. Whether named in patches or not,
// a connection without window scaling gets a scale of 0/0: without that, the
// restored kernel shifts its windows by a scale of its own choice and the
// connection sticks. PatchSockets may be called again. Nothing else may use the
// image meanwhile, and after an error it is of no use.
func PatchSockets(dir string, socks []Socket, patches map[uint32]SocketPatch) error {
	streams := make([]uint32, 0, len(socks))
	have := make(map[uint32]bool, len(socks))
	for i := range socks {
		if socks[i].Stream {
			streams = append(streams, socks[i].Inode)
			have[socks[i].Inode] = true
		}
	}
	for inode := range patches {
		if !have[inode] {
			return fmt.Errorf("patch socket %#x: not a connection of this image", inode)
		}
	}
	return inParallel(len(streams), func(i int) error { return patchStream(dir, streams[i], patches[streams[i]]) })
}

func patchStream(dir string, inode uint32, p SocketPatch) error {
	name := streamName(inode)
	b, err := readImageFile(dir, name, magicTCPStream)
	if err != nil {
		return err
	}
	msg, end, err := imageMessage(b, imageHeader)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	t := &tcpstream.TcpStreamEntry{}
	if err := proto.Unmarshal(msg, t); err != nil {
		return fmt.Errorf("read %s: %w: %w", name, errImage, err)
	}
	if !applyPatch(t, p) {
		return nil
	}
	msg, err = proto.Marshal(t) // keeps fields that this build does not know
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	out := append([]byte(nil), b[:imageHeader]...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
	out = append(out, msg...)
	out = append(out, b[end:]...)
	return overwriteFile(filepath.Join(dir, name), out)
}

// applyPatch reports whether it changed t.
func applyPatch(t *tcpstream.TcpStreamEntry, p SocketPatch) bool {
	changed := false
	if p.Timestamp != nil && t.GetOptMask()&OptTimestamps != 0 && t.GetTimestamp() != *p.Timestamp {
		t.Timestamp = proto.Uint32(*p.Timestamp)
		changed = true
	}
	if p.WriteSeq != nil && t.GetOutqSeq() != uint32(*p.WriteSeq) {
		t.OutqSeq = proto.Uint32(uint32(*p.WriteSeq))
		changed = true
	}
	if w := p.Scales; w != nil && (t.GetSndWscale() != uint32(w.Snd) || t.GetRcvWscale() != uint32(w.Rcv) || t.GetOptMask()&OptWScale == 0) {
		t.OptMask = proto.Uint32(t.GetOptMask() | OptWScale)
		t.SndWscale, t.RcvWscale = proto.Uint32(uint32(w.Snd)), proto.Uint32(uint32(w.Rcv))
		changed = true
	}
	if t.GetOptMask()&OptWScale == 0 {
		t.OptMask = proto.Uint32(t.GetOptMask() | OptWScale)
		t.SndWscale, t.RcvWscale = proto.Uint32(0), proto.Uint32(0)
		changed = true
	}
	return changed
}

// overwriteFile writes a file in place: with one file for each connection, making
// a new one is half of what a patch takes.
func overwriteFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

// replaceFile writes a file beside path and renames it, so that nobody sees half
// of it.
func replaceFile(path string, b []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}
