package checkpoint

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"

	tcpstream "github.com/checkpoint-restore/go-criu/v7/crit/images/tcp-stream"
	"google.golang.org/protobuf/proto"
)

// SocketPatch is what to change of one connection before it is restored.
type SocketPatch struct {
	// Timestamp is the TSval clock to go on with. CRIU restores the clock of the
	// dump, and then the client discards everything as old (PAWS, RFC 7323
	// section 5): give the last TSval that was sent, plus the time passed, plus
	// a margin. Ignored where the connection has no timestamps.
	Timestamp *uint32
}

// PatchSockets rewrites the connections of the image in dir for a restore. The
// keys are Socket.Inode; one that the image does not have is an error. Whether
// named in patches or not, a connection without window scaling gets a scale of
// 0/0: without that, the restored kernel shifts its windows by a scale of its
// own choice and the connection sticks. PatchSockets may be called again.
func PatchSockets(dir string, patches map[uint32]SocketPatch) error {
	socks, err := ReadSockets(dir)
	if err != nil {
		return err
	}
	have := make(map[uint32]bool, len(socks))
	for _, s := range socks {
		if !s.Stream {
			continue
		}
		have[s.Inode] = true
		if err := patchStream(dir, s.Inode, patches[s.Inode]); err != nil {
			return err
		}
	}
	for inode := range patches {
		if !have[inode] {
			return fmt.Errorf("patch socket %#x: not a connection of this image", inode)
		}
	}
	return nil
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
	return replaceFile(filepath.Join(dir, name), out)
}

// applyPatch reports whether it changed t.
func applyPatch(t *tcpstream.TcpStreamEntry, p SocketPatch) bool {
	changed := false
	if p.Timestamp != nil && t.GetOptMask()&OptTimestamps != 0 && t.GetTimestamp() != *p.Timestamp {
		t.Timestamp = proto.Uint32(*p.Timestamp)
		changed = true
	}
	if t.GetOptMask()&OptWScale == 0 {
		t.OptMask = proto.Uint32(t.GetOptMask() | OptWScale)
		t.SndWscale, t.RcvWscale = proto.Uint32(0), proto.Uint32(0)
		changed = true
	}
	return changed
}

// replaceFile writes a file beside path and renames it, so that a hard link of
// the old one (a generation shares files with the one before) is left alone and
// nobody sees half of it.
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
