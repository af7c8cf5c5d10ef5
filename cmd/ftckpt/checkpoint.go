package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/control"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

func (a *app) checkpointCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "checkpoint",
		Short: "Take a generation now and wait until it is stable",
		Long: `Ask a service's daemon for a new generation, wait until it is stable, and print
its id, size in bytes and pause in microseconds on one line (for cron):

  generation=7 bytes=10485760 pause_us=8123`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			name, err := a.oneService(name)
			if err != nil {
				return err
			}
			res, err := control.Checkpoint(cmd.Context(), a.common.RunDir, name)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "generation=%d bytes=%d pause_us=%d\n", res.ID, res.Bytes, res.PauseUS)
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the service (default the only one there is)")
	return cmd
}

// oneService is name, or the only service of the run directory when name is "".
func (a *app) oneService(name string) (string, error) {
	if name != "" {
		return name, a.origins.Explain(config.CheckName(name))
	}
	names, err := control.Services(a.common.RunDir)
	switch {
	case err != nil:
		return "", err
	case len(names) == 0:
		return "", fmt.Errorf("no service runs in %s (another --run-dir?)", a.common.RunDir)
	case len(names) > 1:
		return "", exitcode.Errorf(exitcode.Usage, "there are several services in %s: say which with --name (%s)", a.common.RunDir, strings.Join(names, ", "))
	}
	return names[0], nil
}
