package checkpoint

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	fsimg "github.com/checkpoint-restore/go-criu/v7/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/ftckpt/ftckpt/stream"
)

// FileFact is a file that the image needs at the same path on the restoring host.
type FileFact struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
	// Hash is set for what is executed or mapped, whose content the image relies
	// on: CRIU believes a file of the right size when it has no build-ID.
	Hash *Hashes `json:"hash,omitempty"`
	Dir  bool    `json:"dir,omitempty"` // a working directory
	// Written is set for what the service writes: it may have any size, and its
	// content is not the image's.
	Written bool `json:"written,omitempty"`
}

// Hasher hashes files and remembers the hash for as long as device, inode, size
// and time of change stay the same. It is safe for concurrent use.
type Hasher struct {
	mu    sync.Mutex
	known map[hashKey]stream.Hash
}

type hashKey struct {
	dev, ino    uint64
	size        int64
	mtim, ctime unix.Timespec
}

// maxHashed bounds the memory of a Hasher.
const maxHashed = 16 << 10

// Hash is the BLAKE3-256 of a file's content.
func (h *Hasher) Hash(path string) (stream.Hash, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return stream.Hash{}, 0, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return stream.Hash{}, 0, fmt.Errorf("stat %s: %w", path, err)
	}
	key := hashKey{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
	h.mu.Lock()
	sum, ok := h.known[key]
	h.mu.Unlock()
	if ok {
		return sum, st.Size, nil
	}
	b := blake3.New(stream.HashSize, nil)
	if _, err := io.CopyBuffer(struct{ io.Writer }{b}, f, make([]byte, 1<<20)); err != nil {
		return stream.Hash{}, 0, fmt.Errorf("read %s: %w", path, err)
	}
	b.Sum(sum[:0])
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known == nil || len(h.known) >= maxHashed {
		h.known = make(map[hashKey]stream.Hash)
	}
	h.known[key] = sum
	return sum, st.Size, nil
}

// CollectFacts lists what the image in dir relies on, and hashes what it maps.
// pid is the dumped process as we see it, through whose root directory the paths
// are looked up; it must still be there.
func CollectFacts(dir string, pid int, c Criu, h *Hasher) (Target, []FileFact, error) {
	tree, err := ReadTree(dir)
	if err != nil {
		return Target{}, nil, err
	}
	im, err := readFileTable(dir, tree)
	if err != nil {
		return Target{}, nil, err
	}
	t := Target{PID: tree[0].PID, Exe: im.exe, Cwd: im.cwd, Criu: c.Version.String(), CPU: cpuModel()}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		t.Kernel, t.Hostname = unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Nodename[:])
	}
	root := fmt.Sprintf("/proc/%d/root", pid)
	var facts []FileFact
	for path, use := range im.files {
		f := FileFact{Path: path, Size: use.size, Dir: use.dir, Written: use.written && !use.mapped}
		if use.mapped {
			sum, size, err := h.Hash(filepath.Join(root, path))
			if err != nil {
				return Target{}, nil, fmt.Errorf("hash mapped file: %w", err)
			}
			f.Size, f.Hash = size, &Hashes{sum}
		}
		facts = append(facts, f)
	}
	sort.Slice(facts, func(i, j int) bool { return facts[i].Path < facts[j].Path })
	return t, facts, nil
}

type fileUse struct {
	size                 int64
	mapped, dir, written bool
}

type fileTable struct {
	exe, cwd string
	files    map[string]fileUse
}

// readFileTable finds the named files of an image and how they are used. Files
// that were deleted or that CRIU carries in the image itself are left out.
func readFileTable(dir string, tree []Task) (fileTable, error) {
	t := fileTable{files: make(map[string]fileUse)}
	entries, err := decodeAll[fdinfo.FileEntry](dir, "files.img", magicFiles)
	if err != nil {
		return t, err
	}
	names := make(map[uint32]string)
	for _, e := range entries {
		r := e.GetReg()
		if e.GetType() != fdinfo.FdTypes_REG || r == nil || !filepath.IsAbs(r.GetName()) {
			continue
		}
		name := filepath.Clean(r.GetName())
		mode := r.GetMode() & unix.S_IFMT
		if mode != unix.S_IFREG && mode != unix.S_IFDIR || virtual(name) || strings.HasSuffix(name, " (deleted)") {
			continue
		}
		names[r.GetId()] = name
		u := t.files[name]
		u.size = int64(r.GetSize())
		u.dir = mode == unix.S_IFDIR
		u.written = u.written || r.GetFlags()&accessMode != readOnly
		t.files[name] = u
	}
	for i, task := range tree {
		ms, err := decodeAll[mm.MmEntry](dir, fmt.Sprintf("mm-%d.img", task.PID), magicMM)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a zombie
		}
		if err != nil {
			return t, err
		}
		fss, err := decodeAll[fsimg.FsEntry](dir, fmt.Sprintf("fs-%d.img", task.PID), magicFS)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return t, err
		}
		for _, m := range ms {
			t.markMapped(names, m)
			if i == 0 {
				t.exe = names[m.GetExeFileId()]
			}
		}
		for _, f := range fss {
			if i == 0 {
				t.cwd = names[f.GetCwdId()]
			}
		}
	}
	return t, nil
}

// vmaFilePrivate is CRIU's status bit (criu/include/image.h) of a private mapping
// of a file, whose id is then in shmid. A shared one is data of the service: its
// content may differ.
const vmaFilePrivate = 1 << 6

func (t *fileTable) markMapped(names map[uint32]string, m *mm.MmEntry) {
	mark := func(id uint32) {
		if name, ok := names[id]; ok {
			u := t.files[name]
			u.mapped = !u.dir
			t.files[name] = u
		}
	}
	mark(m.GetExeFileId())
	for _, v := range m.GetVmas() {
		if v.GetStatus()&vmaFilePrivate != 0 {
			mark(uint32(v.GetShmid()))
		}
	}
}

// virtual reports whether a path is of a file system that the kernel makes up.
func virtual(path string) bool {
	for _, p := range []string{"/proc/", "/sys/", "/dev/"} {
		if strings.HasPrefix(path, p) && !strings.HasPrefix(path, "/dev/shm/") {
			return true
		}
	}
	return false
}

// maxMismatches bounds how many files an error of VerifyFiles names.
const maxMismatches = 10

// ErrFilesDiffer says that this host's files are not those of the primary.
var ErrFilesDiffer = errors.New("files differ from the primary's")

// VerifyFiles checks that this host, under root ("/" for the host itself), has
// the files a manifest lists. The error wraps ErrFilesDiffer and names them.
func VerifyFiles(facts []FileFact, root string, h *Hasher) error {
	var why []string
	for _, f := range facts {
		if w := verifyFile(f, filepath.Join(root, f.Path), h); w != "" {
			why = append(why, f.Path+" "+w)
		}
	}
	if len(why) == 0 {
		return nil
	}
	more := ""
	if len(why) > maxMismatches {
		more = fmt.Sprintf(" and %d more", len(why)-maxMismatches)
		why = why[:maxMismatches]
	}
	return fmt.Errorf("%w: %s%s: install the same packages and files on both hosts", ErrFilesDiffer, strings.Join(why, ", "), more)
}

func verifyFile(f FileFact, path string, h *Hasher) string {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "is missing"
	case err != nil:
		return fmt.Sprintf("cannot be read (%v)", err)
	case f.Dir != info.IsDir():
		return "is of another kind"
	case f.Dir || f.Written:
		return ""
	case info.Size() != f.Size:
		return fmt.Sprintf("has %d octets, not %d", info.Size(), f.Size)
	case f.Hash == nil:
		return ""
	}
	sum, _, err := h.Hash(path)
	if err != nil {
		return fmt.Sprintf("cannot be read (%v)", err)
	}
	if len(*f.Hash) != 1 || (*f.Hash)[0] != sum {
		return "has another content"
	}
	return ""
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	sc := bufio.NewScanner(io.LimitReader(f, 64<<10))
	for sc.Scan() {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
