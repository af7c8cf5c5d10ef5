package demo

import (
	_ "embed"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"html/template"
	"io"
	"math"
	"time"

	"github.com/ftckpt/ftckpt/internal/loadgen"
)

//go:embed report.html
var reportHTML string

var reportTemplate = template.Must(template.New("report").Parse(reportHTML))

// chartData is what the page's script draws. Times are milliseconds after the
// fault (negative: before it), latencies milliseconds.
type chartData struct {
	StartMS float64      `json:"start_ms"`
	EndMS   float64      `json:"end_ms"`
	Events  []chartEvent `json:"events"`
	Conns   []chartConn  `json:"conns"`
}

type chartEvent struct {
	Name string  `json:"name"`
	MS   float64 `json:"ms"`
}

type chartConn struct {
	ID     int    `json:"id"`
	Kind   string `json:"kind"`
	Stride int    `json:"stride"`
	// Points are pairs of little-endian uint32, base64: microseconds after
	// StartMS, and the latency in microseconds.
	Points string `json:"points"`
}

type reportRow struct {
	Title, Says, At, Took string
}

type reportClient struct {
	ID                         int
	Kind, Requests, Bytes      string
	Wait                       string
	WaitWidth                  float64 // percent of the longest
	Errors                     []string
	Mismatches, Resets, Wrongs int64
}

type reportTile struct {
	Label, Value string
	Bad          bool
}

type reportPage struct {
	Title   string
	Verdict string
	Good    bool
	When    string
	Fault   string
	Seed    uint64
	Tiles   []reportTile
	Rows    []reportRow
	Clients []reportClient
	Data    chartData
}

// WriteReport writes the run as one self-contained page.
func (t Timeline) WriteReport(w io.Writer) error {
	if err := reportTemplate.Execute(w, t.page()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

func (t Timeline) page() reportPage {
	s := t.Summary()
	failed, _ := t.At(Failed)
	p := reportPage{
		Title:   map[bool]string{true: "No client noticed", false: "Clients noticed"}[s.Perfect()],
		Verdict: s.facts(), Good: s.Perfect(), Seed: t.Seed,
		Fault: t.says(Failed), When: failed.UTC().Format("2 January 2006, 15:04:05 UTC"),
		Tiles: []reportTile{
			{Label: "requests", Value: group(s.Requests)},
			{Label: "bytes compared", Value: humanBytes(s.BytesChecked)},
			{Label: "wrong replies", Value: group(s.Mismatches), Bad: s.Mismatches > 0},
			{Label: "connections lost", Value: group(s.Resets), Bad: s.Resets > 0},
			{Label: "longest wait", Value: human(s.StallMS)},
			{Label: "until detected", Value: human(s.DetectMS)},
			{Label: "restore", Value: human(s.RestoreMS)},
			{Label: "replay", Value: human(s.ReplayMS)},
		},
	}
	for i, e := range t.Events {
		r := reportRow{Title: title(e.Name), Says: t.says(e.Name), At: fmt.Sprintf("%.3f s", e.At.Sub(failed).Seconds())}
		if i > 0 {
			r.Took = human(ms(e.At.Sub(t.Events[i-1].At)))
		}
		p.Rows = append(p.Rows, r)
	}
	for _, c := range t.clients() {
		row := reportClient{
			ID: c.ID, Kind: c.Kind, Requests: group(c.Requests), Bytes: humanBytes(c.BytesChecked),
			Wait: human(float64(c.StallUS) / 1000), Errors: c.Errors,
			Mismatches: c.Mismatches, Resets: c.Resets, Wrongs: c.Mismatches + c.Resets,
		}
		if t.Load.StallUS > 0 {
			row.WaitWidth = math.Round(1000*float64(c.StallUS)/float64(t.Load.StallUS)) / 10
		}
		p.Clients = append(p.Clients, row)
	}
	p.Data = t.chart(failed)
	return p
}

func (t Timeline) chart(failed time.Time) chartData {
	d := chartData{StartMS: ms(t.Load.Started.Sub(failed)), EndMS: ms(t.Load.Ended.Sub(failed)), Events: []chartEvent{}, Conns: []chartConn{}}
	for _, e := range t.Events {
		d.Events = append(d.Events, chartEvent{title(e.Name), ms(e.At.Sub(failed))})
	}
	for _, c := range t.clients() {
		d.Conns = append(d.Conns, chartConn{c.ID, c.Kind, max(1, c.Samples.Stride), points(c.Samples)})
	}
	return d
}

// points packs samples; 32 bits of microseconds are an hour and eleven minutes.
func points(s loadgen.Samples) string {
	clamp := func(v int64) uint32 { return uint32(min(max(v, 0), math.MaxUint32)) }
	b := make([]byte, 0, 8*len(s.AtUS))
	for i := range min(len(s.AtUS), len(s.TookUS)) {
		b = binary.LittleEndian.AppendUint32(b, clamp(s.AtUS[i]))
		b = binary.LittleEndian.AppendUint32(b, clamp(s.TookUS[i]))
	}
	return base64.StdEncoding.EncodeToString(b)
}

func humanBytes(n int64) string {
	switch f := float64(n); {
	case n >= 1e9:
		return fmt.Sprintf("%.2f GB", f/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", f/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", f/1e3)
	}
	return fmt.Sprintf("%d B", n)
}
