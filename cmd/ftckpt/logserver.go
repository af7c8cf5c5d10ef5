package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/ready"
	"github.com/ftckpt/ftckpt/stream"
)

func (a *app) logserverCmd() *cobra.Command {
	var cfg config.LogServer
	cmd := &cobra.Command{
		Use:   "logserver --listen ADDR:PORT",
		Short: "Keep the logs of services on a host of their own (in the foreground)",
		Long: `Keep the logs of services on a third host, so that the death of either of the
other two, or of the network between them, leaves the log whole.

Prints one line, "join: STRING", whose STRING is for "ftckpt protect --join".
The string is a secret.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Common = a.common
			if err := a.origins.Require("logserver", "listen"); err != nil {
				return err
			}
			if err := a.origins.Explain(cfg.Validate()); err != nil {
				return err
			}
			return daemon(cmd.Context(), a, logserver, cfg)
		},
	}
	cfg.Flags(cmd.Flags())
	return cmd
}

func logserver(ctx context.Context, cfg config.LogServer, out io.Writer, log *slog.Logger) error {
	mode := stream.SyncAlways
	if cfg.Sync == config.SyncInterval {
		mode = stream.SyncInterval
	}
	srv, err := stream.StartServer(stream.ServerOptions{
		Listen:   cfg.Listen,
		StoreDir: cfg.StoreDir(),
		Sync:     mode,
		OnSpace: func(s stream.Space) {
			if s.Low {
				log.Warn("little room left for the log: free some, or the log will stop", "dir", cfg.StoreDir(), "free_bytes", s.Free)
			} else {
				log.Info("there is room for the log again", "dir", cfg.StoreDir(), "free_bytes", s.Free)
			}
		},
	})
	if err != nil {
		return fmt.Errorf("start log server on %s: %w", cfg.Listen, err)
	}
	defer srv.Shutdown()
	log.Info("log server is up", "listen", srv.Addr(), "dir", cfg.StoreDir(), "sync", cfg.Sync)
	if err := ready.Announce(out, "join: "+srv.JoinString(), "listening on "+srv.Addr()); err != nil {
		return err
	}
	<-ctx.Done()
	log.Info("log server stops")
	if err := ready.Stopping(); err != nil {
		log.Warn(err.Error())
	}
	return nil
}
