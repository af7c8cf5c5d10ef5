package demo

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/loadgen"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got; -update writes it anew):\n%s", name, d)
	}
}

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const standbyLog = `not json
{"time":"2026-01-02T03:04:01Z","event":"suspect","level":"INFO","msg":"suspect"}
{"time":"2026-01-02T03:04:05.213Z","event":"suspect"}
{"time":"2026-01-02T03:04:05.220512Z","event":"fenced","epoch":2}
{"time":"2026-01-02T03:04:05.221Z","event":"something-else"}
{"time":"2026-01-02T03:04:05.231Z","event":"vip-taken"}
{"event":"restored"}
{"time":"2026-01-02T03:04:05.301Z","event":"restored"}
{"time":"2026-01-02T03:04:05.342Z","event":"replayed"}
{"time":"2026-01-02T03:04:05.35Z","event":"live"}
`

// example is a run as it might have been, with made-up but plausible numbers.
func example(t *testing.T) Timeline {
	t.Helper()
	events, err := ParseEvents(strings.NewReader(standbyLog))
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	load := loadgen.Result{Seed: 7, Started: t0.Add(-8 * time.Second), Ended: t0.Add(8 * time.Second)}
	for id, kind := range []string{"redis", "redis", "redis", "idle", "upload", "download", "half"} {
		c := loadgen.ConnResult{ID: id, Kind: kind, BytesChecked: int64(1_234_567 * (id + 1)), Samples: loadgen.Samples{Stride: 1}}
		for at := int64(id * 1000); at < 16e6; {
			took := int64(200 + rng.ExpFloat64()*400)
			if at < 8e6 && at+took >= 8e6 || at >= 8e6 && at < 8.35e6 {
				took = 8.35e6 - at + rng.Int64N(30_000)
			}
			c.Samples.AtUS = append(c.Samples.AtUS, at)
			c.Samples.TookUS = append(c.Samples.TookUS, took)
			c.Requests++
			c.StallUS = max(c.StallUS, took)
			at += took + int64(rng.ExpFloat64()*map[bool]float64{true: 15_000, false: 1_500_000}[kind != "idle"])
		}
		load.Conns = append(load.Conns, c)
	}
	for _, c := range load.Conns {
		load.Requests += c.Requests
		load.BytesChecked += c.BytesChecked
		load.StallUS = max(load.StallUS, c.StallUS)
	}
	load.Connections = len(load.Conns)
	tl := NewTimeline(FaultHost, t0, events, load)
	tl.Takes = 1
	return tl
}

func TestEventsOfTheTakeoverOnly(t *testing.T) {
	tl := example(t)
	var names []string
	for _, e := range tl.Events {
		names = append(names, e.Name)
	}
	if !slices.Equal(names, order) {
		t.Errorf("events %v, want %v", names, order)
	}
	if d, ok := tl.Since(Suspect); !ok || d != 213*time.Millisecond {
		t.Errorf("suspected after %v: the suspicion before the fault counted", d)
	}
	if _, ok := tl.Since("something-else"); ok {
		t.Error("an unknown event is told")
	}
}

func TestText(t *testing.T) {
	for name, change := range map[string]func(*Timeline){
		"host.txt":    func(*Timeline) {},
		"process.txt": func(tl *Timeline) { tl.Fault = FaultProcess },
		"noticed.txt": func(tl *Timeline) {
			tl.Events = tl.Events[:1]
			tl.Takes = 0
			tl.Load.Mismatches, tl.Load.Resets = 1, 2
			tl.Load.Conns[1].Errors = []string{`1.5s: mismatch: GET c1:s3: want "a", got "b"`}
		},
	} {
		tl := example(t)
		change(&tl)
		var b bytes.Buffer
		if err := tl.Text(&b); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.Bytes())
	}
}

func TestSummary(t *testing.T) {
	tl := example(t)
	s := tl.Summary()
	if s.DetectMS != 213 || s.RestoreMS != 70 || s.ReplayMS != 41 || s.Takeovers != 1 || !s.Perfect() || s.Connections != 7 {
		t.Errorf("%+v", s)
	}
	tl.Takeover = &control.Takeover{DetectMS: 1, RestoreMS: 68.5, ReplayMS: 40.25}
	if s := tl.Summary(); s.DetectMS != 213 || s.RestoreMS != 68.5 || s.ReplayMS != 40.25 {
		t.Errorf("the standby's measurements were not used: %+v", s)
	}
	tl.Load.Resets = 1
	if tl.Summary().Perfect() {
		t.Error("a reset is perfect")
	}
	// The names are a contract (cli.md).
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"requests", "connections", "bytes_checked", "mismatches", "resets", "stall_ms", "detect_ms", "restore_ms", "replay_ms", "takeovers"} {
		if _, ok := m[key]; !ok {
			t.Errorf("summary lacks %q: %s", key, b)
		}
	}
}

func TestReport(t *testing.T) {
	tl := example(t)
	tl.Load.Conns[2].Errors = []string{`</script><script>alert(1)</script>`}
	var b bytes.Buffer
	if err := tl.WriteReport(&b); err != nil {
		t.Fatal(err)
	}
	page := b.String()
	if out := os.Getenv("FTCKPT_REPORT"); out != "" { // to look at it
		if err := os.WriteFile(out, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if m := regexp.MustCompile(`(?i)(src|href)\s*=|url\(|@import|https?://|fetch\(`).FindString(page); m != "" {
		t.Errorf("the page is not self-contained: %q", m)
	}
	if strings.Contains(page, "alert(1)</script>") {
		t.Error("text of an error became markup")
	}
	for _, want := range []string{"No client noticed", "address taken", "clients are answered again", "0.350 s", "213 ms", "5 download"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	m := regexp.MustCompile(`(?s)id="data">(.*?)</script>`).FindStringSubmatch(page)
	if m == nil {
		t.Fatal("no data")
	}
	var d chartData
	if err := json.Unmarshal([]byte(m[1]), &d); err != nil {
		t.Fatal(err)
	}
	if d.StartMS != -8000 || d.EndMS != 8000 || len(d.Events) != len(order) || d.Events[6].MS != 350 || len(d.Conns) != 7 {
		t.Errorf("%v %v %v, %d connections", d.StartMS, d.EndMS, d.Events, len(d.Conns))
	}
	for i, c := range d.Conns {
		raw, err := base64.StdEncoding.DecodeString(c.Points)
		if err != nil || len(raw) != 8*len(tl.Load.Conns[i].Samples.AtUS) {
			t.Fatalf("connection %d: %d bytes of points, %v", i, len(raw), err)
		}
		for j := range tl.Load.Conns[i].Samples.AtUS {
			at, took := binary.LittleEndian.Uint32(raw[8*j:]), binary.LittleEndian.Uint32(raw[8*j+4:])
			if int64(at) != tl.Load.Conns[i].Samples.AtUS[j] || int64(took) != tl.Load.Conns[i].Samples.TookUS[j] {
				t.Fatalf("point %d of connection %d is (%d, %d)", j, i, at, took)
			}
		}
	}
}

func TestReportOfNothing(t *testing.T) {
	var b bytes.Buffer
	if err := NewTimeline(FaultProcess, t0, nil, loadgen.Result{Started: t0, Ended: t0}).WriteReport(&b); err != nil {
		t.Fatal(err)
	}
}

func TestHuman(t *testing.T) {
	for v, want := range map[float64]string{0: "0.00 ms", 9.876: "9.88 ms", 98.76: "98.8 ms", 987.6: "988 ms", 9876: "9.88 s"} {
		if got := human(v); got != want {
			t.Errorf("human(%v) = %q, want %q", v, got, want)
		}
	}
	for v, want := range map[int64]string{0: "0", 999: "999", 1000: "1 000", 1234567: "1 234 567"} {
		if got := group(v); got != want {
			t.Errorf("group(%d) = %q, want %q", v, got, want)
		}
	}
}
