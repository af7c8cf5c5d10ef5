package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

const watchEvery = time.Second

func (a *app) statusCmd() *cobra.Command {
	var asJSON, watch bool
	var name string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the services of this host stand",
		Long: `Show how a service stands, asking its daemon; without --name, every service of
the run directory.

With --json it prints one object: the service's, or {"services": [...],
"unreachable": [...]} when there is not exactly one and no --name was given.
With --watch it prints one line (or object) a second for each service.

Exit status 5 when a service is unprotected, 6 when this node is fenced, 1 when
a daemon does not answer.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name != "" {
				if err := a.origins.Explain(config.CheckName(name)); err != nil {
					return err
				}
			}
			if watch {
				return a.watchStatus(cmd.Context(), name, asJSON)
			}
			r, err := survey(cmd.Context(), a.common.RunDir, name)
			if err != nil {
				return err
			}
			if asJSON {
				err = writeJSON(a.stdout, r.document())
			} else {
				err = r.write(a.stdout)
			}
			if err != nil {
				return err
			}
			return exitcode.Quiet(r.exitCode())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	cmd.Flags().BoolVar(&watch, "watch", false, "go on, once a second, until interrupted")
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the service (default all)")
	return cmd
}

// report is what survey found.
type report struct {
	Services    []control.Status `json:"services"`
	Unreachable []unreachable    `json:"unreachable"`
	runDir      string
}

type unreachable struct {
	Service string `json:"service"`
	Error   string `json:"error"`
}

// survey asks the daemon of service name, or of every service in runDir. It
// fails when there is none to ask, or when the only one asked for by name
// does not answer.
func survey(ctx context.Context, runDir, name string) (report, error) {
	r := report{Services: []control.Status{}, Unreachable: []unreachable{}, runDir: runDir}
	names := []string{name}
	if name == "" {
		var err error
		if names, err = control.Services(runDir); err != nil {
			return r, err
		}
	}
	for _, n := range names {
		st, err := control.GetStatus(ctx, runDir, n)
		switch {
		case err == nil:
			r.Services = append(r.Services, st)
		case len(names) == 1:
			return r, err
		default:
			r.Unreachable = append(r.Unreachable, unreachable{Service: n, Error: err.Error()})
		}
	}
	if len(names) == 0 {
		return r, fmt.Errorf("no service runs in %s (another --run-dir?)", runDir)
	}
	return r, nil
}

// document is what --json prints.
func (r report) document() any {
	if len(r.Services) == 1 && len(r.Unreachable) == 0 {
		return r.Services[0]
	}
	return r
}

// exitCode is the status of the service that is worst off.
func (r report) exitCode() exitcode.Code {
	if len(r.Unreachable) > 0 {
		return exitcode.Failed
	}
	worst := exitcode.OK
	for _, s := range r.Services {
		worst = max(worst, s.ExitCode())
	}
	return worst
}

// write is the form for people.
func (r report) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, s := range r.Services {
		if i > 0 {
			fmt.Fprintln(tw)
		}
		writeStatus(tw, s)
	}
	for _, u := range r.Unreachable {
		fmt.Fprintf(tw, "\n%s\n  error\t%s\n", u.Service, u.Error)
	}
	return tw.Flush()
}

func writeStatus(w io.Writer, s control.Status) {
	row := func(key, format string, args ...any) {
		fmt.Fprintf(w, "  %s\t%s\n", key, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(w, "%s\n", s.Service)
	row("role", "%s on %s, epoch %d", s.Role, s.Node, s.Epoch)
	row("protected", "%s", protection(s))
	if s.PID != 0 {
		row("server", "pid %d, %d connections", s.PID, s.Connections)
	} else {
		row("connections", "%d", s.Connections)
	}
	if len(s.VIPs) > 0 {
		row("address", "%s, ports %s", strings.Join(s.VIPs, ", "), joinPorts(s.Ports))
		if len(s.ClientNets) > 0 {
			row("clients", "%s; others are not protected", strings.Join(s.ClientNets, ", "))
		}
	}
	if o := s.Outgoing; o != nil {
		row("outgoing", "%d connections protected, to %s; %d others", o.Connections, orDash(strings.Join(o.Peers, " ")), o.Others)
		for _, u := range o.Unprotected {
			row("", "not protected: %s to %s: %s", u.Local, u.Remote, u.Remedy)
		}
	}
	row("log", "%s, %s; survives the death of its %s", orDash(s.Log.URL), orDash(string(s.Log.State)), survivor(s.Log.Durability))
	row("stable", "position %d; behind it %d records, %s, for %s", s.Log.Stable, s.Log.LagRecords, size(s.Log.LagBytes), micros(s.Log.LagUS))
	if g := s.Generation; g.ID != 0 {
		row("generation", "%d, %s old, %s, pause %s", g.ID, seconds(g.AgeSeconds), size(g.Bytes), micros(g.PauseUS))
	} else {
		row("generation", "none yet")
	}
	row("held", "%d packets; they wait %s (p50), %s (p99)", s.Held.Packets, micros(s.Held.P50US), micros(s.Held.P99US))
	if s.QueueDrops != 0 || s.Divergences != 0 {
		row("trouble", "%d packets dropped by a full queue, %d divergences", s.QueueDrops, s.Divergences)
	}
	if s.Expired != 0 {
		row("expired", "%d connections were idle for too long and not protected any more", s.Expired)
	}
	if s.Recreate != "" {
		row("re-creation", "%s, of connections younger than the generation", s.Recreate)
	}
	if s.Translated != 0 {
		row("translated", "%d connections", s.Translated)
	}
	for _, b := range s.Standbys {
		row("standby", "%s, %s, generation %d, %d records behind, heard of %s ago", b.Node, orDash(b.Mode), b.Generation, b.LagRecords, micros(b.SeenUS))
	}
	if t := s.Takeover; t != nil {
		row("takeovers", "%d; the last took %.0f ms: detect %.0f, fence %.0f, address %.0f, restore %.0f, replay %.0f; %d connections carried over, %d reset",
			s.Takeovers, t.TotalMS, t.DetectMS, t.FenceMS, t.VIPMS, t.RestoreMS, t.ReplayMS, t.Connections, t.Resets)
	}
}

func protection(s control.Status) string {
	switch {
	case s.Protected && s.ProtectedSince != nil:
		return "yes, since " + s.ProtectedSince.Format(time.RFC3339)
	case s.Protected:
		return "yes"
	case s.Reason != "":
		return "NO: " + s.Reason
	default:
		return "NO"
	}
}

func survivor(d control.Durability) string {
	if d == control.DurablePower {
		return "host's power"
	}
	return "process"
}

// watchStatus prints a line a second for each service until ctx ends. A daemon
// that does not answer is what one watches for, not a reason to stop.
func (a *app) watchStatus(ctx context.Context, name string, asJSON bool) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		if err := a.watchOnce(ctx, name, asJSON); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (a *app) watchOnce(ctx context.Context, name string, asJSON bool) error {
	r, err := survey(ctx, a.common.RunDir, name)
	switch {
	case ctx.Err() != nil: // what err says is that we were told to stop
		return nil //nolint:nilerr // which is no failure
	case err != nil: // a daemon that does not answer is what one watches for
		a.log.Warn(err.Error())
		return nil
	case asJSON:
		return writeJSON(a.stdout, r.document())
	default:
		return r.writeLines(a.stdout, time.Now())
	}
}

// writeLines is the form of --watch for people.
func (r report) writeLines(w io.Writer, now time.Time) error {
	var b strings.Builder
	for _, s := range r.Services {
		fmt.Fprintf(&b, "%s %s %s epoch %d protected %s; connections %d, generation %d (%s old), behind %d records %s, held %d, p99 %s\n",
			now.Format(time.TimeOnly), s.Service, s.Role, s.Epoch, protection(s), s.Connections,
			s.Generation.ID, seconds(s.Generation.AgeSeconds), s.Log.LagRecords, micros(s.Log.LagUS), s.Held.Packets, micros(s.Held.P99US))
	}
	for _, u := range r.Unreachable {
		fmt.Fprintf(&b, "%s %s error: %s\n", now.Format(time.TimeOnly), u.Service, u.Error)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeJSON(w io.Writer, v any) error {
	return json.NewEncoder(w).Encode(v)
}

func joinPorts(ports []uint16) string {
	var list []string
	for _, p := range ports {
		list = append(list, strconv.Itoa(int(p)))
	}
	return orDash(strings.Join(list, ", "))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func micros(us int64) string { return (time.Duration(us) * time.Microsecond).String() }

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(100 * time.Millisecond).String()
}

// size is n bytes for people.
func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, exp := float64(n)/unit, 0
	for v >= unit && exp < 5 {
		v /= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[exp])
}
