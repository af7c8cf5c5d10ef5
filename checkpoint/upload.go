package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"lukechampine.com/blake3"

	"github.com/ftckpt/ftckpt/stream"
)

// ChunkStore keeps content under its hash. stream.Store is one; the contract of
// each method is there.
type ChunkStore interface {
	PutReader(ctx context.Context, r io.Reader) (chunks []stream.Hash, sent int64, err error)
	CopyTo(ctx context.Context, w io.Writer, chunks []stream.Hash) error
	PutBlob(ctx context.Context, b []byte) (stream.Hash, error)
	Get(ctx context.Context, h stream.Hash) ([]byte, error)
}

// TransferStats says what an upload or a download moved, in octets.
type TransferStats struct {
	Files int
	Bytes int64 // size of the image
	Moved int64 // what went over the wire: the rest was there already
}

// packLimit is the size from which on a file has chunks of its own. Smaller ones
// (a service has one for every connection) go into one pack, since each chunk
// costs a round trip; large ones, above all pages, keep their own alignment, so
// that what did not change since the last generation is not sent again.
const packLimit = stream.ChunkSize

// Upload stores the files of an image directory, logs excepted, and returns
// where they are. It reads the directory only; nothing may write to it.
func Upload(ctx context.Context, store ChunkStore, dir string) (Image, TransferStats, error) {
	var im Image
	var st TransferStats
	files, err := imageFiles(dir)
	if err != nil {
		return im, st, fmt.Errorf("upload image: %w", err)
	}
	var small []string
	for _, f := range files {
		st.Files++
		st.Bytes += f.Size
		if f.Size < packLimit {
			small = append(small, filepath.Join(dir, f.Name))
			im.Files = append(im.Files, f)
			continue
		}
		var sent int64
		if f.Chunks, sent, err = putFile(ctx, store, filepath.Join(dir, f.Name), f.Size); err != nil {
			return Image{}, st, fmt.Errorf("upload image: %s: %w", f.Name, err)
		}
		st.Moved += sent
		im.Files = append(im.Files, f)
	}
	if len(small) > 0 {
		r := &fileChain{paths: small}
		defer r.Close()
		chunks, sent, err := store.PutReader(ctx, r)
		if err != nil {
			return Image{}, st, fmt.Errorf("upload image: %w", err)
		}
		im.Pack = chunks
		st.Moved += sent
	}
	if err := im.valid(); err != nil { // a file that changed under our hands
		return Image{}, st, fmt.Errorf("upload image: %w", err)
	}
	return im, st, nil
}

// imageFiles lists an image directory in the order of names.
func imageFiles(dir string) ([]ImageFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []ImageFile
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".log") || strings.HasPrefix(e.Name(), "stats-") {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is not a plain file", e.Name())
		}
		files = append(files, ImageFile{Name: e.Name(), Size: info.Size(), Mode: uint32(info.Mode().Perm())})
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no image in %s", dir)
	}
	sort.Slice(files, func(i, j int) bool { return files[i].Name < files[j].Name })
	return files, nil
}

func putFile(ctx context.Context, store ChunkStore, path string, size int64) (Hashes, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	return store.PutReader(ctx, io.LimitReader(f, size))
}

// fileChain reads files one after the other with one of them open at a time.
type fileChain struct {
	paths []string
	f     *os.File
}

func (c *fileChain) Read(p []byte) (int, error) {
	for {
		if c.f == nil {
			if len(c.paths) == 0 {
				return 0, io.EOF
			}
			f, err := os.Open(c.paths[0])
			if err != nil {
				return 0, err
			}
			c.f, c.paths = f, c.paths[1:]
		}
		n, err := c.f.Read(p)
		if n > 0 || (err != nil && err != io.EOF) {
			return n, err
		}
		if err == io.EOF {
			c.Close()
		}
	}
}

// Close closes the file that is open, if one is.
func (c *fileChain) Close() {
	if c.f != nil {
		_ = c.f.Close() // it was only read
		c.f = nil
	}
}

// Local is a generation that is already on this host.
type Local struct {
	Dir   string
	Image Image
}

// Download writes an image into dir, which must not exist; dir appears when all
// is there. Chunks are verified by the store. What prev (may be nil) has under
// the same hash is copied from there, verified as well, instead of fetched.
func Download(ctx context.Context, store ChunkStore, im Image, dir string, prev *Local) (TransferStats, error) {
	var st TransferStats
	if err := im.valid(); err != nil {
		return st, fmt.Errorf("download image: %w", err)
	}
	if _, err := os.Lstat(dir); err == nil {
		return st, fmt.Errorf("download image: %s exists", dir)
	}
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil { // of a download that was cut off
		return st, fmt.Errorf("download image: %w", err)
	}
	if err := os.MkdirAll(part, 0o700); err != nil {
		return st, fmt.Errorf("download image: %w", err)
	}
	d := downloader{store: store, dir: part, known: knownChunks(prev), st: &st}
	defer d.close()
	err := d.all(ctx, im)
	if err == nil {
		err = os.Rename(part, dir)
	}
	if err != nil {
		_ = os.RemoveAll(part)
		return st, fmt.Errorf("download image: %w", err)
	}
	return st, nil
}

// place is where a chunk lies on this host.
type place struct {
	path string
	off  int64
	n    int
}

func knownChunks(prev *Local) map[stream.Hash]place {
	if prev == nil {
		return nil
	}
	known := make(map[stream.Hash]place)
	for _, f := range prev.Image.Files {
		for i, h := range f.Chunks {
			off := int64(i) * stream.ChunkSize
			known[h] = place{filepath.Join(prev.Dir, f.Name), off, int(min(stream.ChunkSize, f.Size-off))}
		}
	}
	return known
}

type downloader struct {
	store ChunkStore
	dir   string
	known map[stream.Hash]place
	st    *TransferStats

	open map[string]*os.File
	buf  []byte
}

func (d *downloader) close() {
	for _, f := range d.open {
		_ = f.Close() // they were only read
	}
}

func (d *downloader) all(ctx context.Context, im Image) error {
	split := &splitter{dir: d.dir}
	for _, f := range im.Files {
		d.st.Files++
		d.st.Bytes += f.Size
		if len(f.Chunks) == 0 {
			split.files = append(split.files, f)
			continue
		}
		if err := d.file(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	if len(im.Pack) > 0 {
		if err := d.store.CopyTo(ctx, split, im.Pack); err != nil {
			split.abort()
			return err
		}
		d.st.Moved += split.taken
	}
	return split.finish()
}

// file writes one large file, with what is known copied and the rest fetched in
// runs that are as long as possible.
func (d *downloader) file(ctx context.Context, f ImageFile) error {
	out, err := os.OpenFile(filepath.Join(d.dir, f.Name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, os.FileMode(f.Mode)&0o700|0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	count := &countWriter{w: out, left: f.Size}
	for i := 0; i < len(f.Chunks); {
		if d.copyKnown(count, f.Chunks[i]) {
			i++
			continue
		}
		j := i + 1
		for j < len(f.Chunks) {
			if _, ok := d.known[f.Chunks[j]]; ok {
				break
			}
			j++
		}
		before := count.left
		if err := d.store.CopyTo(ctx, count, f.Chunks[i:j]); err != nil {
			return err
		}
		d.st.Moved += before - count.left
		i = j
	}
	if count.left != 0 {
		return fmt.Errorf("%w: %d octets are missing", ErrManifest, count.left)
	}
	return out.Close()
}

// copyKnown reports whether it could write the chunk from what is on this host.
func (d *downloader) copyKnown(w io.Writer, h stream.Hash) bool {
	p, ok := d.known[h]
	if !ok {
		return false
	}
	f := d.open[p.path]
	if f == nil {
		var err error
		if f, err = os.Open(p.path); err != nil {
			delete(d.known, h)
			return false
		}
		if d.open == nil {
			d.open = make(map[string]*os.File)
		}
		d.open[p.path] = f
	}
	if d.buf == nil {
		d.buf = make([]byte, stream.ChunkSize)
	}
	b := d.buf[:p.n]
	if _, err := f.ReadAt(b, p.off); err != nil || stream.Hash(blake3.Sum256(b)) != h {
		delete(d.known, h) // it changed since
		return false
	}
	_, err := w.Write(b)
	return err == nil
}

// errTooLong says that chunks hold more than the manifest says.
var errTooLong = errors.New("chunks hold more than the manifest says")

// countWriter refuses more than left octets.
type countWriter struct {
	w    io.Writer
	left int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		return 0, errTooLong
	}
	n, err := c.w.Write(p)
	c.left -= int64(n)
	return n, err
}

// splitter writes a pack into its files.
type splitter struct {
	dir   string
	files []ImageFile // still to be written
	cur   *os.File
	left  int64
	taken int64
}

func (s *splitter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		for s.left == 0 {
			if err := s.next(); err != nil {
				return done, err
			}
		}
		n, err := s.cur.Write(p[done:min(len(p), done+int(min(s.left, int64(len(p)))))])
		done += n
		s.left -= int64(n)
		s.taken += int64(n)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// next begins the next file, which may be an empty one.
func (s *splitter) next() error {
	if err := s.closeCur(); err != nil {
		return err
	}
	if len(s.files) == 0 {
		return errTooLong
	}
	f := s.files[0]
	s.files = s.files[1:]
	var err error
	s.cur, err = os.OpenFile(filepath.Join(s.dir, f.Name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, os.FileMode(f.Mode)&0o700|0o600)
	s.left = f.Size
	return err
}

func (s *splitter) closeCur() error {
	if s.cur == nil {
		return nil
	}
	err := s.cur.Close()
	s.cur = nil
	return err
}

func (s *splitter) abort() { _ = s.closeCur() }

// finish makes the empty files at the end and checks that nothing is missing.
func (s *splitter) finish() error {
	for s.left == 0 && len(s.files) > 0 {
		if err := s.next(); err != nil {
			return err
		}
	}
	if err := s.closeCur(); err != nil {
		return err
	}
	if s.left != 0 || len(s.files) > 0 {
		return fmt.Errorf("%w: the pack is cut short", ErrManifest)
	}
	return nil
}
