package checkpoint

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"
)

// The shape of a CRIU image file: two magic numbers, then records of a 32-bit
// length and a protobuf message (criu/include/magic.h, criu/image.c).
const (
	magicCommon  = 0x54564319
	magicService = 0x55105940

	magicFiles     = 0x56303138
	magicPstree    = 0x50273030
	magicTCPStream = 0x51465506
	magicStats     = 0x57093306
	magicMM        = 0x57492820
	magicFS        = 0x51403912
	magicFDInfo    = 0x56213732
	magicIDs       = 0x54432030
)

// maxImageRead bounds what is read of one decoded image: a service with 100,000
// connections has about 30 MB of files.img. Pages are never decoded.
const maxImageRead = 256 << 20

// maxMessage bounds one message of an image; the largest real ones, a process's
// memory map, are some hundred kilobytes.
const maxMessage = 64 << 20

// errImage says that a file is not the image it should be.
var errImage = errors.New("bad image")

// readImage reads dir/name, checks its magic number and calls entry for every
// message. entry returns how many octets of payload follow its message outside
// of protobuf (a socket's queues), which are skipped.
func readImage(dir, name string, magic uint32, entry func(msg []byte) (payload int64, err error)) error {
	b, err := readImageFile(dir, name, magic)
	if err != nil {
		return err
	}
	for off := imageHeader; off < len(b); {
		msg, end, err := imageMessage(b, off)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		skip, err := entry(msg)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if skip < 0 || skip > int64(len(b)-end) {
			return fmt.Errorf("read %s: %w: payload of %d octets is cut short", name, errImage, skip)
		}
		off = end + int(skip)
	}
	return nil
}

const imageHeader = 8

func readImageFile(dir, name string, magic uint32) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	defer f.Close()
	var buf bytes.Buffer
	if n, err := io.Copy(&buf, io.LimitReader(f, maxImageRead+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	} else if n > maxImageRead {
		return nil, fmt.Errorf("read %s: %w: larger than %d octets", name, errImage, maxImageRead)
	}
	b := buf.Bytes()
	if len(b) < imageHeader {
		return nil, fmt.Errorf("read %s: %w: no header", name, errImage)
	}
	class, kind := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if (class != magicCommon && class != magicService) || kind != magic {
		return nil, fmt.Errorf("read %s: %w: magic %#x %#x", name, errImage, class, kind)
	}
	return b, nil
}

// imageMessage is the message at off and the offset of its end.
func imageMessage(b []byte, off int) (msg []byte, end int, err error) {
	if len(b)-off < 4 {
		return nil, 0, fmt.Errorf("%w: cut short", errImage)
	}
	n := binary.LittleEndian.Uint32(b[off:])
	off += 4
	if n > maxMessage || int(n) > len(b)-off {
		return nil, 0, fmt.Errorf("%w: message of %d octets is cut short", errImage, n)
	}
	return b[off : off+int(n)], off + int(n), nil
}

// decodeAll reads every message of an image that has nothing but messages.
func decodeAll[T any, P interface {
	*T
	proto.Message
}](dir, name string, magic uint32) ([]P, error) {
	var all []P
	err := readImage(dir, name, magic, func(msg []byte) (int64, error) {
		m := P(new(T))
		if err := proto.Unmarshal(msg, m); err != nil {
			return 0, fmt.Errorf("%w: %w", errImage, err)
		}
		all = append(all, m)
		return 0, nil
	})
	return all, err
}
