package checkpoint

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/ftckpt/ftckpt/internal/seqnum"
	"github.com/ftckpt/ftckpt/stream"
)

// ManifestVersion is the format this build writes, and the only one it reads.
const ManifestVersion = 1

// Bounds of what DecodeManifest believes.
const (
	maxManifest  = stream.MaxBlob
	maxImageSize = 1 << 42 // 4 TiB
	maxFiles     = 1 << 20
	maxConns     = 1 << 20
	maxTasks     = 1 << 16
	maxName      = 255
	maxPath      = 4096
)

// Errors of DecodeManifest.
var (
	ErrManifest = errors.New("bad manifest")
	ErrVersion  = errors.New("manifest of another version")
)

// Manifest describes one generation: what it is, where in the log it stands and
// of which chunks it is made. It is stored as a blob; a stream.Generation record
// with its hash makes it count.
type Manifest struct {
	Version int              `json:"version"`
	ID      uint64           `json:"id"`
	Service string           `json:"service"`
	Epoch   stream.Epoch     `json:"epoch"`
	Created time.Time        `json:"created"`
	Cut     stream.Position  `json:"cut"`      // the image stands at this position
	From    stream.Position  `json:"from"`     // first record that a recovery needs
	FromSeq stream.StreamSeq `json:"from_seq"` // the message which holds it

	PauseUS    int64 `json:"pause_us"` // how long packets were held for the dump
	ImageBytes int64 `json:"image_bytes"`

	Image  Image      `json:"image"`
	Tree   []Task     `json:"tree"`
	Conns  []ConnCut  `json:"conns"`
	Target Target     `json:"target"`
	Files  []FileFact `json:"files"`
	// SocketOptions are those of sockets of the image that CRIU does not carry over.
	SocketOptions []SocketOptions `json:"socket_options,omitempty"`
	South         json.RawMessage `json:"south,omitempty"` // state of the wrappers; not interpreted here
}

// ConnCut is where one connection of the image stands, and its name in the log.
type ConnCut struct {
	Conn      stream.ConnID    `json:"conn"`
	Inode     uint32           `json:"inode"` // Socket.Inode
	Tuple     stream.FourTuple `json:"tuple"`
	State     TCPState         `json:"state"`
	RcvNxt    seqnum.Value     `json:"rcv_nxt"`
	CopiedSeq seqnum.Value     `json:"copied_seq"`
	WriteSeq  seqnum.Value     `json:"write_seq"`
	SndNxt    seqnum.Value     `json:"snd_nxt"`
	SndUna    seqnum.Value     `json:"snd_una"`
	// SndUp is the urgent pointer of what the server has sent and its client has not
	// acknowledged, if any: no image has it.
	SndUp     *seqnum.Value `json:"snd_up,omitempty"`
	SndWScale uint8         `json:"snd_wscale"`
	RcvWScale uint8         `json:"rcv_wscale"`
	Options   uint32        `json:"options"`
	Timestamp uint32        `json:"timestamp"`
}

// Cut makes a manifest's entry of a connection of an image.
func (s Socket) Cut(conn stream.ConnID) ConnCut {
	return ConnCut{
		Conn: conn, Inode: s.Inode, Tuple: s.Tuple, State: s.State,
		RcvNxt: s.RcvNxt, CopiedSeq: s.CopiedSeq, WriteSeq: s.WriteSeq, SndNxt: s.SndNxt, SndUna: s.SndUna,
		SndWScale: s.SndWScale, RcvWScale: s.RcvWScale, Options: s.Options, Timestamp: s.Timestamp,
	}
}

// Target is the process that was dumped and the host it ran on.
type Target struct {
	PID      int    `json:"pid"` // in its own PID namespace
	Exe      string `json:"exe"`
	Cwd      string `json:"cwd"`
	Criu     string `json:"criu"`
	Kernel   string `json:"kernel"`
	CPU      string `json:"cpu"`
	Hostname string `json:"hostname"`
}

// Image is where the files of an image directory are in the chunk store.
type Image struct {
	Files []ImageFile `json:"files"`
	// Pack holds the small files, one after the other in the order of Files.
	Pack Hashes `json:"pack,omitempty"`
}

// ImageFile is one file of an image.
type ImageFile struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Mode   uint32 `json:"mode"`
	Chunks Hashes `json:"chunks,omitempty"` // empty: in the pack
}

// Hashes is a list of chunks. Its text form is the base64 of all of them.
type Hashes []stream.Hash

// MarshalText implements encoding.TextMarshaler.
func (h Hashes) MarshalText() ([]byte, error) {
	raw := make([]byte, 0, len(h)*stream.HashSize)
	for i := range h {
		raw = append(raw, h[i][:]...)
	}
	return base64.StdEncoding.AppendEncode(nil, raw), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hashes) UnmarshalText(b []byte) error {
	raw, err := base64.StdEncoding.AppendDecode(nil, b)
	if err != nil {
		return err
	}
	if len(raw)%stream.HashSize != 0 {
		return fmt.Errorf("list of hashes of %d octets", len(raw))
	}
	*h = make(Hashes, len(raw)/stream.HashSize)
	for i := range *h {
		copy((*h)[i][:], raw[i*stream.HashSize:])
	}
	return nil
}

// Encode gives the stored form. Version is set by it.
func (m Manifest) Encode() ([]byte, error) {
	m.Version = ManifestVersion
	if err := m.valid(); err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	if len(b) > maxManifest {
		return nil, fmt.Errorf("encode manifest: %w: %d octets, at most %d", ErrManifest, len(b), maxManifest)
	}
	return b, nil
}

// DecodeManifest reads what Encode wrote, and trusts none of it: every name is a
// plain file name and every size and count is bounded.
func DecodeManifest(b []byte) (Manifest, error) {
	var m Manifest
	if len(b) > maxManifest {
		return m, fmt.Errorf("decode manifest: %w: %d octets", ErrManifest, len(b))
	}
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return m, fmt.Errorf("decode manifest: %w: %w", ErrManifest, err)
	}
	if v.Version != ManifestVersion {
		return m, fmt.Errorf("decode manifest: %w: %d, this build reads %d", ErrVersion, v.Version, ManifestVersion)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return Manifest{}, fmt.Errorf("decode manifest: %w: %w", ErrManifest, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return Manifest{}, fmt.Errorf("decode manifest: %w: something follows it", ErrManifest)
	}
	if err := m.valid(); err != nil {
		return Manifest{}, fmt.Errorf("decode manifest: %w", err)
	}
	return m, nil
}

func (m Manifest) valid() error {
	switch {
	case m.From > m.Cut+1:
		return fmt.Errorf("%w: recovery would begin at %d, behind the cut at %d", ErrManifest, m.From, m.Cut)
	case len(m.Tree) > maxTasks, len(m.Conns) > maxConns, len(m.Files) > maxFiles:
		return fmt.Errorf("%w: too many processes, connections or files", ErrManifest)
	}
	for _, f := range m.Files {
		if !filepath.IsAbs(f.Path) || len(f.Path) > maxPath || f.Size < 0 {
			return fmt.Errorf("%w: file %.80q", ErrManifest, f.Path)
		}
	}
	if err := m.validOptions(); err != nil {
		return err
	}
	return m.Image.valid()
}

func (im Image) valid() error {
	if len(im.Files) > maxFiles {
		return fmt.Errorf("%w: %d image files", ErrManifest, len(im.Files))
	}
	seen := make(map[string]bool, len(im.Files))
	var packed int64
	for _, f := range im.Files {
		switch {
		case f.Name == "" || f.Name == "." || f.Name == ".." || len(f.Name) > maxName || filepath.Base(f.Name) != f.Name:
			return fmt.Errorf("%w: image file name %.80q", ErrManifest, f.Name)
		case seen[f.Name]:
			return fmt.Errorf("%w: image file %s twice", ErrManifest, f.Name)
		case f.Size < 0 || f.Size > maxImageSize:
			return fmt.Errorf("%w: image file %s of %d octets", ErrManifest, f.Name, f.Size)
		case len(f.Chunks) == 0:
			packed += f.Size
		case int64(len(f.Chunks)) != chunkCount(f.Size):
			return fmt.Errorf("%w: image file %s: %d chunks for %d octets", ErrManifest, f.Name, len(f.Chunks), f.Size)
		}
		seen[f.Name] = true
		if packed > maxImageSize {
			return fmt.Errorf("%w: pack of more than %d octets", ErrManifest, int64(maxImageSize))
		}
	}
	if int64(len(im.Pack)) != chunkCount(packed) {
		return fmt.Errorf("%w: pack: %d chunks for %d octets", ErrManifest, len(im.Pack), packed)
	}
	return nil
}

func chunkCount(size int64) int64 { return (size + stream.ChunkSize - 1) / stream.ChunkSize }

// Hashes lists every chunk that the image needs, duplicates included.
func (im Image) Hashes() Hashes {
	all := append(Hashes(nil), im.Pack...)
	for _, f := range im.Files {
		all = append(all, f.Chunks...)
	}
	return all
}
