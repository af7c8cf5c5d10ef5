package main

import (
	"net"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
	"github.com/ftckpt/ftckpt/internal/node"
)

func (a *app) protectCmd() *cobra.Command {
	var cfg config.Protect
	cmd := &cobra.Command{
		Use:   "protect --pid N --vip ADDR/LEN --dev IFACE {--join STRING | --log URL}",
		Short: "Protect a running server (in the foreground)",
		Long: `Protect a running server: log what its clients send before anything that depends
on it leaves, and checkpoint it from time to time, so that a standby can take
over its connections.

Stays in the foreground and prints "protected" once a standby could take over.
SIGTERM ends the protection; the server and its connections live on.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Common = a.common
			if err := a.origins.Exclusive("join", "log"); err != nil {
				return err
			}
			if err := a.origins.Require("protect", "pid", "vip", "dev"); err != nil {
				return err
			}
			if cfg.Join == "" && cfg.Log == "" {
				return exitcode.Errorf(exitcode.Usage, "protect needs a log: --join with what \"ftckpt standby\" printed, or --log with the URL of a NATS server")
			}
			if err := a.origins.Explain(cfg.Validate()); err != nil {
				return err
			}
			if err := a.haveDev(cfg.Dev); err != nil {
				return err
			}
			return daemon(cmd.Context(), a, node.Protect, cfg)
		},
	}
	cfg.Flags(cmd.Flags())
	return cmd
}

// haveDev says when this host has no interface of that name.
func (a *app) haveDev(name string) error {
	if _, err := net.InterfaceByName(name); err != nil {
		return a.origins.Explain(&config.SettingError{Key: "dev", Err: exitcode.Errorf(exitcode.Config, "no interface %q on this host (see \"ip link\")", name)})
	}
	return nil
}
