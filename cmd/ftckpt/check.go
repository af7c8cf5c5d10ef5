package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/checkpoint/check"
	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/replay/reqsk"
)

// checkReport is what --json prints.
type checkReport struct {
	Ready        bool                `json:"ready"`
	Requirements []check.Requirement `json:"requirements"`
	Target       *check.TargetReport `json:"target,omitempty"`       // with --pid
	TargetError  string              `json:"target_error,omitempty"` // why there is no Target
}

func (a *app) checkCmd() *cobra.Command {
	var asJSON bool
	var pid int
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say whether this host, and a process, can be protected",
		Long: `Try everything that ftckpt needs of this host, a dump and a restore of a small
process with an established connection among it, and say for each whether it
works, is missing or could not be told, and what to do. With --pid, look at that
process as well, without stopping it.

Exit status 4 when something is in the way.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.origins.IsSet("pid") && pid < 1 {
				return a.origins.Explain(&config.SettingError{Key: "pid", Err: fmt.Errorf("%d is not a process", pid)})
			}
			r := checkReport{Requirements: append(check.Host(cmd.Context(), check.Options{StateDir: a.common.StateDir}), recreation())}
			if err := cmd.Context().Err(); err != nil {
				return fmt.Errorf("check this host: %w", err)
			}
			r.Ready = check.Ready(r.Requirements)
			if pid != 0 {
				r.inspect(pid)
			}
			var err error
			if asJSON {
				err = writeJSON(a.stdout, r)
			} else {
				err = r.write(a.stdout)
			}
			if err == nil && !r.Ready {
				err = exitcode.Quiet(exitcode.Unsuitable)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	cmd.Flags().IntVar(&pid, "pid", 0, "look at process `N`, too")
	return cmd
}

// recreation says whether young connections can be made again with their old
// numbers. Where they cannot, a standby translates them.
func recreation() check.Requirement {
	r := check.Requirement{Name: "re-creation by BPF", Optional: true, State: check.Works}
	if s, err := reqsk.Probe(); err != nil {
		r.State, r.Detail = check.Unknown, err.Error()
		if s == reqsk.No {
			r.State = check.Missing
		}
		r.Remedy = "nothing: a standby translates the numbers of connections that are younger than the newest generation instead; a kernel of 6.9 or newer spares it that"
	}
	return r
}

func (r *checkReport) inspect(pid int) {
	target, err := check.InspectTarget(pid)
	if err != nil {
		r.TargetError, r.Ready = err.Error(), false
		return
	}
	r.Target = &target
	r.Ready = r.Ready && target.Err() == nil
}

// write is the form for people.
func (r *checkReport) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, q := range r.Requirements {
		state := q.State.String()
		if q.Optional && q.State != check.Works {
			state += " (optional)"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", q.Name, state, q.Detail)
		if q.Remedy != "" {
			fmt.Fprintf(tw, "\t\tto do: %s\n", q.Remedy)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	host := "yes"
	if !check.Ready(r.Requirements) {
		host = "NO"
	}
	if _, err := fmt.Fprintf(w, "\nthis host can protect: %s\n", host); err != nil {
		return err
	}
	return r.writeTarget(w)
}

func (r *checkReport) writeTarget(w io.Writer) error {
	t := r.Target
	if t == nil {
		if r.TargetError != "" {
			_, err := fmt.Fprintf(w, "this process can be protected: NO: %s\n", r.TargetError)
			return err
		}
		return nil
	}
	answer := "yes"
	if t.Err() != nil {
		answer = "NO"
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "pid %d can be protected: %s (%s, %d processes)\n", t.PID, answer, t.Exe, t.Processes)
	for _, l := range t.Listeners {
		fmt.Fprintf(tw, "  listens\t%s\n", l.Addr)
	}
	told := map[string]bool{} // one line for each peer
	for _, c := range t.Opened {
		if remedy := c.Remedy(); !told[remedy] {
			told[remedy] = true
			fmt.Fprintf(tw, "  opens\t%s to %s\t%s\n", c.Local, c.Remote, remedy)
		}
	}
	for _, p := range t.Problems {
		fmt.Fprintf(tw, "  in the way\t%s\n", p)
	}
	return tw.Flush()
}
