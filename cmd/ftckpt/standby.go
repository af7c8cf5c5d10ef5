package main

import (
	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/node"
)

func (a *app) standbyCmd() *cobra.Command {
	var cfg config.Standby
	cmd := &cobra.Command{
		Use:   "standby --dev IFACE [--join STRING | --log URL]",
		Short: "Stand by to take over a service (in the foreground)",
		Long: `Stand by for a service: follow its log, keep its newest generation, and take it
over with its address and connections when the primary falls silent.

Without --join or --log it keeps the log itself and prints one line, "join:
STRING", whose STRING is for "ftckpt protect --join". The string is a secret. A
log kept here cannot tell a dead primary from a cut network, but it is safe
either way: a primary that cannot reach it lets nothing out.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Common = a.common
			if err := a.origins.Exclusive("join", "log"); err != nil {
				return err
			}
			if cfg.Join != "" {
				cfg.Log = "" // its default is for a standby that keeps the log
			}
			if err := a.origins.Require("standby", "dev"); err != nil {
				return err
			}
			if err := a.origins.Explain(cfg.Validate()); err != nil {
				return err
			}
			if err := a.haveDev(cfg.Dev); err != nil {
				return err
			}
			return daemon(cmd.Context(), a, node.Standby, cfg)
		},
	}
	cfg.Flags(cmd.Flags())
	return cmd
}
