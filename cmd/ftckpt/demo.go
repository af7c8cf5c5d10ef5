package main

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/demo"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

func (a *app) demoCmd() *cobra.Command {
	var cfg config.Demo
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a server's host die while its clients do not notice",
		Long: `Build a lab of hosts out of namespaces, run redis-server and clients that check
every reply, break the server, and tell what happened. Nothing outside the lab
is touched, and nothing of it is left behind.

Exit status 0 only if no client got a wrong byte or lost its connection.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Common = a.common
			if err := a.origins.Explain(cfg.Validate()); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("the demo makes namespaces, packet filters and checkpoints: run it as root")
			}
			_, err := demo.Run(cmd.Context(), demo.Options{
				Fault:       demo.Fault(cfg.Fault),
				Connections: cfg.Connections,
				Duration:    cfg.Duration,
				LogAt:       demo.LogAt(cfg.LogAt),
				Seed:        cfg.Seed,
				Report:      cfg.Report,
				JSON:        cfg.JSON,
			}, a.stdout, a.stderr)
			if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
				return exitcode.Errorf(exitcode.Failed, "the demo was interrupted")
			}
			return err
		},
	}
	cfg.Flags(cmd.Flags())
	return cmd
}
