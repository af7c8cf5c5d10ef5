package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"lukechampine.com/blake3"
	"pgregory.net/rapid"

	"github.com/ftckpt/ftckpt/stream"
)

// memStore is stream.Store's contract in memory.
type memStore struct {
	chunks map[stream.Hash][]byte
}

var errMissing = errors.New("chunk is missing")

func (s *memStore) PutReader(ctx context.Context, r io.Reader) (chunks []stream.Hash, sent int64, err error) {
	for {
		b := make([]byte, stream.ChunkSize)
		n, err := io.ReadFull(r, b)
		if n > 0 {
			h := stream.Hash(blake3.Sum256(b[:n]))
			if _, ok := s.chunks[h]; !ok {
				s.chunks[h] = b[:n]
				sent += int64(n)
			}
			chunks = append(chunks, h)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return chunks, sent, ctx.Err()
		}
		if err != nil {
			return nil, sent, err
		}
	}
}

func (s *memStore) CopyTo(_ context.Context, w io.Writer, chunks []stream.Hash) error {
	for _, h := range chunks {
		b, ok := s.chunks[h]
		if !ok {
			return errMissing
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) PutBlob(ctx context.Context, b []byte) (stream.Hash, error) {
	h, _, err := s.PutReader(ctx, bytes.NewReader(b))
	return h[0], err
}

func (s *memStore) Get(_ context.Context, h stream.Hash) ([]byte, error) {
	if b, ok := s.chunks[h]; ok {
		return b, nil
	}
	return nil, errMissing
}

var _ ChunkStore = (*stream.Store)(nil)

func newMemStore() *memStore { return &memStore{chunks: map[stream.Hash][]byte{}} }

// writeDir makes a directory of files and returns what is in it.
func writeDir(t rapid.TB, dir string, files map[string][]byte) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func sameDir(t rapid.TB, dir string, want map[string][]byte) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(want) {
		t.Fatalf("%d files, want %d", len(entries), len(want))
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, want[e.Name()]) {
			t.Fatalf("%s differs: %d octets, want %d", e.Name(), len(b), len(want[e.Name()]))
		}
	}
}

// Whatever the sizes, what comes down is what went up; a second generation moves
// only what changed.
func TestUploadDownload(t *testing.T) {
	root := t.TempDir()
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		base := filepath.Join(root, fmt.Sprint(run))
		files := map[string][]byte{}
		for i, n := range rapid.SliceOfN(rapid.SampledFrom([]int{
			0, 1, 100, 5000, stream.ChunkSize - 1, stream.ChunkSize, stream.ChunkSize + 1, 3 * stream.ChunkSize,
		}), 1, 8).Draw(rt, "sizes") {
			b := make([]byte, n)
			for j := range b {
				b[j] = byte(j>>8) ^ byte(j*i) ^ byte(run)
			}
			files[fmt.Sprintf("f-%d.img", i)] = b
		}
		ctx, store := t.Context(), newMemStore()
		writeDir(rt, base+"/up", files)
		im, st, err := Upload(ctx, store, base+"/up")
		if err != nil {
			rt.Fatal(err)
		}
		if st.Files != len(files) {
			rt.Fatalf("stats %+v", st)
		}
		if st, err := Download(ctx, store, im, base+"/down", nil); err != nil || st.Moved != st.Bytes {
			rt.Fatal(st, err)
		}
		sameDir(rt, base+"/down", files)

		// The next generation, with one octet changed somewhere.
		name := fmt.Sprintf("f-%d.img", rapid.IntRange(0, len(files)-1).Draw(rt, "changed"))
		if b := files[name]; len(b) > 0 {
			b[rapid.IntRange(0, len(b)-1).Draw(rt, "octet")] ^= 0x80
			writeDir(rt, base+"/up", files)
		}
		im2, _, err := Upload(ctx, store, base+"/up")
		if err != nil {
			rt.Fatal(err)
		}
		st2, err := Download(ctx, store, im2, base+"/next", &Local{base + "/down", im})
		if err != nil {
			rt.Fatal(err)
		}
		sameDir(rt, base+"/next", files)
		var small int64
		for _, f := range im2.Files {
			if len(f.Chunks) == 0 {
				small += f.Size
			}
		}
		if st2.Moved > small+stream.ChunkSize {
			rt.Fatalf("fetched %d octets for a change of one", st2.Moved)
		}
	})
}

func TestDownloadMakesAllOrNothing(t *testing.T) {
	root, store := t.TempDir(), newMemStore()
	files := map[string][]byte{"pages-1.img": bytes.Repeat([]byte("abc"), stream.ChunkSize), "files.img": []byte("x"), "dump.log": []byte("log")}
	writeDir(t, root+"/up", files)
	im, _, err := Upload(t.Context(), store, root+"/up")
	if err != nil {
		t.Fatal(err)
	}
	if len(im.Files) != 2 {
		t.Fatalf("the log was uploaded: %+v", im.Files)
	}
	big := im.Files[1]
	lost := store.chunks[big.Chunks[1]]
	delete(store.chunks, big.Chunks[1])
	if _, err := Download(t.Context(), store, im, root+"/down", nil); !errors.Is(err, errMissing) {
		t.Errorf("a lost chunk gives %v", err)
	}
	for _, p := range []string{"/down", "/down.part"} {
		if _, err := os.Stat(root + p); err == nil {
			t.Errorf("%s was left behind", p)
		}
	}
	// What is local under that hash replaces it, unless it changed since.
	if _, err := Download(t.Context(), store, im, root+"/down", &Local{root + "/up", im}); err != nil {
		t.Errorf("with a local copy: %v", err)
	}
	b := files["pages-1.img"]
	b[stream.ChunkSize]++
	writeDir(t, root+"/up", files)
	if _, err := Download(t.Context(), store, im, root+"/down2", &Local{root + "/up", im}); !errors.Is(err, errMissing) {
		t.Errorf("a local copy that changed was believed: %v", err)
	}
	store.chunks[big.Chunks[1]] = append(lost, 0) // chunks that hold more than the manifest says
	if _, err := Download(t.Context(), store, im, root+"/down3", nil); err == nil {
		t.Error("too long a file was believed")
	}
	if _, err := Download(t.Context(), store, im, root+"/down", nil); err == nil {
		t.Error("an existing directory was written to")
	}
}

func TestUploadRefusesWhatIsNoImage(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := Upload(t.Context(), newMemStore(), dir); err == nil {
		t.Error("an empty directory was uploaded")
	}
	if err := os.Symlink("/etc", dir+"/parent"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Upload(t.Context(), newMemStore(), dir); err == nil {
		t.Error("a link was uploaded")
	}
}
