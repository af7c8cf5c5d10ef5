package checkpoint

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ftckpt/ftckpt/stream"
)

func sample() Manifest {
	return Manifest{
		Version: ManifestVersion, ID: 7, Service: "redis", Epoch: 2, Created: time.Unix(1700000000, 5).UTC(),
		Cut: 100, From: 90, FromSeq: 12, PauseUS: 11000, ImageBytes: 300000,
		Image: Image{
			Files: []ImageFile{
				{Name: "files.img", Size: 10, Mode: 0o600},
				{Name: "pages-1.img", Size: stream.ChunkSize + 1, Mode: 0o600, Chunks: Hashes{{1}, {2}}},
			},
			Pack: Hashes{{3}},
		},
		Tree: []Task{{PID: 5, PGID: 5, SID: 5, Threads: []int{5, 6}}},
		Conns: []ConnCut{{Conn: 9, Inode: 1, Tuple: stream.FourTuple{
			Server: netip.MustParseAddrPort("10.0.0.1:6379"), Client: netip.MustParseAddrPort("[2001:db8::1]:1234"),
		}, State: Established, RcvNxt: 1 << 31, SndUna: 0xffffffff}},
		Target: Target{PID: 5, Exe: "/usr/bin/x"},
		Files:  []FileFact{{Path: "/usr/bin/x", Size: 5, Hash: &Hashes{{4}}}},
		South:  json.RawMessage(`{"a":1}`),
	}
}

func TestManifestRoundTrip(t *testing.T) {
	want := sample()
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeManifest(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.AddrPort{})); d != "" {
		t.Error(d)
	}
}

func TestManifestIsNotTrusted(t *testing.T) {
	for name, spoil := range map[string]func(*Manifest){
		"name with a slash": func(m *Manifest) { m.Image.Files[0].Name = "../x" },
		"dot dot":           func(m *Manifest) { m.Image.Files[0].Name = ".." },
		"no name":           func(m *Manifest) { m.Image.Files[0].Name = "" },
		"name twice":        func(m *Manifest) { m.Image.Files[0].Name = m.Image.Files[1].Name },
		"negative size":     func(m *Manifest) { m.Image.Files[0].Size = -1 },
		"huge size":         func(m *Manifest) { m.Image.Files[0].Size = 1 << 50 },
		"too few chunks":    func(m *Manifest) { m.Image.Files[1].Chunks = m.Image.Files[1].Chunks[:1] },
		"no pack":           func(m *Manifest) { m.Image.Pack = nil },
		"relative path":     func(m *Manifest) { m.Files[0].Path = "etc/passwd" },
		"from behind cut":   func(m *Manifest) { m.From = m.Cut + 2 },
	} {
		m := sample()
		spoil(&m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeManifest(b); !errors.Is(err, ErrManifest) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := m.Encode(); !errors.Is(err, ErrManifest) {
			t.Errorf("%s: written, %v", name, err)
		}
	}
	b, _ := sample().Encode()
	for name, text := range map[string]string{
		"unknown field": strings.Replace(string(b), `"id":`, `"idea":1,"id":`, 1),
		"trailer":       string(b) + "{}",
		"bad hash":      strings.Replace(string(b), `"pack":"`, `"pack":"AAAA`, 1),
		"not json":      "\x00",
	} {
		if _, err := DecodeManifest([]byte(text)); !errors.Is(err, ErrManifest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := DecodeManifest([]byte(`{"version":2}`)); !errors.Is(err, ErrVersion) {
		t.Errorf("another version: %v", err)
	}
}

func FuzzDecodeManifest(f *testing.F) {
	b, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := DecodeManifest(b)
		if err != nil {
			return
		}
		if _, err := m.Encode(); err != nil {
			t.Errorf("read but not written: %v", err)
		}
	})
}
