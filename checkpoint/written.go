package checkpoint

import (
	"encoding/binary"
	"fmt"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"google.golang.org/protobuf/proto"
)

// accessMode is the part of open(2)'s flags that says read, write or both, and
// readOnly its value for the first.
const (
	accessMode = 3
	readOnly   = 0
)

// ForgetSizes makes a restore take files that the service writes at whatever
// size they have now. CRIU insists on the size of the dump, and a log that the
// dying server wrote one more line to would cost all its connections. What is
// only read is still checked. It answers how many files it changed, and may be
// called again.
func ForgetSizes(dir string) (int, error) {
	const name = "files.img"
	b, err := readImageFile(dir, name, magicFiles)
	if err != nil {
		return 0, err
	}
	out := append([]byte(nil), b[:imageHeader]...)
	changed := 0
	for off := imageHeader; off < len(b); {
		msg, end, err := imageMessage(b, off)
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", name, err)
		}
		e := &fdinfo.FileEntry{}
		if err := proto.Unmarshal(msg, e); err != nil {
			return 0, fmt.Errorf("read %s: %w: %w", name, errImage, err)
		}
		if r := e.GetReg(); r != nil && r.Size != nil && r.GetFlags()&accessMode != readOnly {
			r.Size = nil
			changed++
			if msg, err = proto.Marshal(e); err != nil { // keeps fields that this build does not know
				return 0, fmt.Errorf("encode %s: %w", name, err)
			}
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
		out = append(out, msg...)
		off = end
	}
	if changed == 0 {
		return 0, nil
	}
	return changed, replaceFile(filepath.Join(dir, name), out)
}
