package checkpoint

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	tcpstream "github.com/checkpoint-restore/go-criu/v7/crit/images/tcp-stream"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

func TestAddrPort(t *testing.T) {
	word := func(b ...byte) uint32 { return binary.NativeEndian.Uint32(b) }
	for _, c := range []struct {
		family uint32
		words  []uint32
		want   string
	}{
		{afInet, []uint32{word(10, 0, 0, 1)}, "10.0.0.1:80"},
		{afInet6, []uint32{word(0x20, 1, 0xd, 0xb8), 0, 0, word(0, 0, 0, 1)}, "[2001:db8::1]:80"},
		{afInet6, []uint32{0, 0, word(0, 0, 0xff, 0xff), word(10, 0, 0, 1)}, "10.0.0.1:80"}, // v4-mapped
		{afInet6, []uint32{0, 0, 0, 0}, "[::]:80"},
	} {
		got, err := addrPort(c.family, c.words, 80)
		if err != nil || got != netip.MustParseAddrPort(c.want) {
			t.Errorf("%v: %v, %v", c.words, got, err)
		}
	}
	for _, bad := range [][]uint32{nil, {1, 2}} {
		if _, err := addrPort(afInet6, bad, 80); !errors.Is(err, errImage) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if _, err := addrPort(afInet, []uint32{1}, 70000); !errors.Is(err, errImage) {
		t.Errorf("port 70000: %v", err)
	}
}

// fill against what libsoccr does, for every state.
func TestSequenceNumbersOfEveryState(t *testing.T) {
	for _, c := range []struct {
		state                      TCPState
		finRcvd, finQueued, finAck uint32
	}{
		{Established, 0, 0, 0}, {CloseWait, 1, 0, 0}, {FinWait1, 0, 1, 0}, {FinWait2, 0, 1, 1},
		{Closing, 1, 1, 0}, {LastAck, 1, 1, 0},
	} {
		var copied, una uint32 = 0xfffffff0, 0xffffff00 // both wrap
		const inq, outq, unsent = 100, 5000, 300
		if c.finAck == 1 {
			continue
		}
		// The kernel's figures.
		rcvNxt := copied + inq + c.finRcvd
		writeSeq := una + outq + c.finQueued
		// What libsoccr stores: SIOCOUTQ and SIOCOUTQNSD count the FIN and are
		// reduced by one; SIOCINQ does not count it.
		s := Socket{State: c.state}
		s.fill(&tcpstream.TcpStreamEntry{
			InqSeq: &rcvNxt, InqLen: proto.Uint32(inq), OutqSeq: &writeSeq, OutqLen: proto.Uint32(outq), UnsqLen: proto.Uint32(unsent),
		})
		if uint32(s.RcvNxt) != rcvNxt || uint32(s.CopiedSeq) != copied || uint32(s.SndUna) != una ||
			uint32(s.WriteSeq) != writeSeq || uint32(s.SndNxt) != writeSeq-c.finQueued-unsent {
			t.Errorf("%s: %+v", c.state, s)
		}
	}
	s := Socket{State: FinWait2}
	s.fill(&tcpstream.TcpStreamEntry{OutqSeq: proto.Uint32(77), InqSeq: proto.Uint32(5)})
	if s.SndUna != 77 || s.SndNxt != 77 || s.WriteSeq != 77 || s.CopiedSeq != 5 {
		t.Errorf("fin-wait-2: %+v", s)
	}
}

func TestDamagedImages(t *testing.T) {
	dir := t.TempDir()
	head := func(kind uint32) []byte {
		b := binary.LittleEndian.AppendUint32(nil, magicCommon)
		return binary.LittleEndian.AppendUint32(b, kind)
	}
	for name, b := range map[string][]byte{
		"empty":       nil,
		"other magic": head(magicStats),
		"half length": append(head(magicPstree), 1, 0),
		"short":       append(head(magicPstree), 100, 0, 0, 0, 1),
		"huge":        append(head(magicPstree), 0xff, 0xff, 0xff, 0xff, 1),
		"no protobuf": append(head(magicPstree), 2, 0, 0, 0, 0xff, 0xff),
		"no process":  head(magicPstree),
	} {
		if err := os.WriteFile(filepath.Join(dir, "pstree.img"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadTree(dir); !errors.Is(err, errImage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzReadImages(f *testing.F) {
	f.Add([]byte{4, 0, 0, 0, 8, 1, 16, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		dir := t.TempDir()
		for name, kind := range map[string]uint32{"pstree.img": magicPstree, "files.img": magicFiles, "tcp-stream-1.img": magicTCPStream} {
			b := binary.LittleEndian.AppendUint32(nil, magicCommon)
			b = binary.LittleEndian.AppendUint32(b, kind)
			if err := os.WriteFile(filepath.Join(dir, name), append(b, body...), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, _ = ReadTree(dir)
		_, _ = ReadSockets(dir)
		_ = readStream(dir, &Socket{Inode: 1})
		_ = patchStream(dir, 1, SocketPatch{})
	})
}

func TestQuietPIDs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tasks []Task
		for _, p := range rapid.SliceOfN(rapid.IntRange(1, 1000), 1, 30).Draw(t, "pids") {
			tasks = append(tasks, Task{PID: p, PGID: p + 1, SID: p, Threads: []int{p, p + 2}})
		}
		start := quietPIDs(tasks, 64)
		for _, k := range tasks {
			for _, id := range append(k.Threads, k.PID, k.PGID, k.SID) {
				if id > start && id <= start+64 {
					t.Fatalf("%d is taken, numbering goes on from %d", id, start)
				}
			}
		}
	})
}

func TestForeignSession(t *testing.T) {
	own := []Task{{PID: 5, PGID: 5, SID: 5}, {PID: 6, PPID: 5, PGID: 6, SID: 5}}
	if foreignSession(own) {
		t.Error("a tree with its own session")
	}
	for _, tasks := range [][]Task{{{PID: 5, PGID: 5, SID: 1}}, {{PID: 5, PGID: 4, SID: 5}}, append(slices.Clone(own), Task{PID: 7, PPID: 5, PGID: 7, SID: 3})} {
		if !foreignSession(tasks) {
			t.Errorf("%+v", tasks)
		}
	}
}

func TestLogLines(t *testing.T) {
	log := `(00.000) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.001) Collecting fds
(00.002) Warn  (criu/kerndat.c:1): something
(00.003) Error (criu/sk-inet.c:139): inet: no
(00.004) Error (criu/cr-dump.c:1975): Dumping FAILED.
`
	got := logLines(strings.NewReader(log))
	if len(got) != 3 || !strings.Contains(got[0], "something") {
		t.Fatalf("%q", got)
	}
	e := &CriuError{Op: "dump", Err: errors.New("failed"), Log: got}
	if e.Error() != "criu dump: failed: inet: no" {
		t.Errorf("%q", e.Error())
	}
	if n := len(logLines(strings.NewReader(strings.Repeat("Error (a:1): x\n", 1000)))); n != maxLogLines {
		t.Errorf("%d lines kept", n)
	}
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]Version{
		"Version: 4.2.1\n": {4, 2, 1}, "Version: 4.2\nGitID: v4.2\n": {4, 2, 0}, "Version: 3.17.1": {3, 17, 1},
	} {
		if v, err := parseVersion([]byte(text)); err != nil || v != want {
			t.Errorf("%q: %v, %v", text, v, err)
		}
	}
	if _, err := parseVersion([]byte("bash: criu: no")); err == nil {
		t.Error("nonsense was read as a version")
	}
	if !(Version{4, 1, 9}).Less(MinVersion) || (Version{4, 2, 1}).Less(MinVersion) || (Version{5, 0, 0}).Less(MinVersion) {
		t.Error("order of versions")
	}
}
