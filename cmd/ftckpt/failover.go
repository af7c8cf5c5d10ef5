package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/control"
)

func (a *app) failoverCmd() *cobra.Command {
	var req control.FailoverRequest
	var name string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "failover",
		Short: "Move a service to a standby, with nothing lost",
		Long: `Ask a service's primary to give the service to a standby: it takes a generation,
waits until the standby has it, holds its clients, and lets the standby take
over. Nothing is lost and no connection ends; clients wait for a moment. When the
standby does not take over within 3 s the service stays where it is, and the
clients go on.

The daemon here then ends with status 0 and its server is treated as
--fenced-server says. Start ftckpt standby on this host to be protected again.

It prints one line: to=NODE generation=N stall_us=T, the time from holding the
clients to being live there. With --dry-run nothing moves: it says where the
service would go, or why it cannot.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			name, err := a.oneService(name)
			if err != nil {
				return err
			}
			res, err := control.Failover(cmd.Context(), a.common.RunDir, name, req)
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(a.stdout, res)
			}
			if res.DryRun {
				_, err = fmt.Fprintf(a.stdout, "would move to=%s generation=%d\n", res.To, res.Generation)
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "to=%s generation=%d stall_us=%d\n", res.To, res.Generation, res.StallUS)
			return err
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&name, "name", "", "`NAME` of the service (default the only one there is)")
	fs.BoolVar(&req.DryRun, "dry-run", false, "only say whether it could be done, and to which node")
	fs.StringVar(&req.To, "to", "", "`NODE` to move to (default the standby that is furthest along)")
	fs.BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}
