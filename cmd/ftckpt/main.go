// Command ftckpt keeps the TCP connections of a server alive across the death
// of its host. See README.md for what it promises.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/internal/exitcode"
)

func main() {
	becomeHelper()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// The first signal asks, the second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program but for the process: it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr, env: os.LookupEnv}
	return int(a.run(ctx, args))
}

// app is what the commands share.
type app struct {
	stdout, stderr io.Writer
	env            func(string) (string, bool)

	common  config.Common
	origins *config.Origins // after the settings were loaded
	log     *slog.Logger    // to stderr, likewise
}

func (a *app) run(ctx context.Context, args []string) exitcode.Code {
	root := a.rootCmd()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if msg := exitcode.Message(err); msg != "" {
		fmt.Fprintf(a.stderr, "ftckpt: %s\n", msg)
	}
	return exitcode.Of(err)
}

func (a *app) rootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:   "ftckpt",
		Short: "Keep a server's TCP connections alive across the death of its host",
		Long: `ftckpt keeps a server's TCP connections alive across the death of its host.

Every flag --some-flag can also be given as FTCKPT_SOME_FLAG in the environment
or as some-flag in the file of --config; the command line comes first, then the
environment, then the file.

Exit status: 0 done, 1 failed, 2 usage, 3 invalid configuration, 4 this host or
process cannot be protected, 5 running but unprotected, 6 fenced.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return exitcode.Errorf(exitcode.Usage, "unknown command %q (see \"ftckpt --help\")", args[0])
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprint(a.stderr, cmd.UsageString())
			return exitcode.Quiet(exitcode.Usage)
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.load(cmd) },
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetHelpCommand(helpCmd())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return exitcode.Errorf(exitcode.Usage, "%w (see \"%s --help\")", err, cmd.CommandPath())
	})
	a.common.Flags(root.PersistentFlags())
	root.AddCommand(
		a.checkCmd(),
		a.protectCmd(),
		a.standbyCmd(),
		a.logserverCmd(),
		a.statusCmd(),
		a.checkpointCmd(),
		a.failoverCmd(),
		a.demoCmd(),
		a.versionCmd(),
	)
	root.AddCommand(laterCmds()...)
	return root
}

// load fills the settings of cmd from environment and file and starts the
// logging.
func (a *app) load(cmd *cobra.Command) error {
	root := cmd.Root()
	known := func(key string) bool {
		if root.PersistentFlags().Lookup(key) != nil {
			return true
		}
		for _, c := range root.Commands() {
			if c.LocalFlags().Lookup(key) != nil {
				return true
			}
		}
		return false
	}
	var err error
	if a.origins, err = config.Load(cmd.Flags(), known, a.env); err != nil {
		return err
	}
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if a.common.Verbose {
		opts.Level = slog.LevelDebug
	}
	if a.common.LogFormat == config.LogFormatJSON {
		a.log = slog.New(slog.NewJSONHandler(a.stderr, opts))
	} else {
		a.log = slog.New(slog.NewTextHandler(a.stderr, opts))
	}
	return a.origins.Explain(a.common.Validate())
}

// noArgs is cobra.NoArgs with our exit status and wording.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return exitcode.Errorf(exitcode.Usage, "%s takes no argument %q (see \"%s --help\")", cmd.CommandPath(), args[0], cmd.CommandPath())
}

func helpCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about a command",
		// Help must work whatever the settings are.
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return exitcode.Errorf(exitcode.Usage, "unknown command %q (see \"ftckpt --help\")", strings.Join(args, " "))
			}
			return target.Help()
		},
	}
}

// laterCmds are commands of the contract that this version does not have:
// refused by name, and in no help.
func laterCmds() []*cobra.Command {
	var cmds []*cobra.Command
	for _, name := range []string{"run", "inspect"} {
		cmds = append(cmds, &cobra.Command{
			Use:                name,
			Hidden:             true,
			DisableFlagParsing: true,
			PersistentPreRunE:  func(*cobra.Command, []string) error { return nil },
			RunE: func(*cobra.Command, []string) error {
				return exitcode.Errorf(exitcode.Usage, "%s: this version does not have this command yet", name)
			},
		})
	}
	return cmds
}

// daemon runs one that stays in the foreground until it fails or is told to
// end.
func daemon[C any](ctx context.Context, a *app, serve func(context.Context, C, io.Writer, *slog.Logger) error, cfg C) error {
	// A reader of our output that went away (ftckpt protect | head) must not
	// kill a daemon: its rules would stay and stall the server. A handler, not
	// SIG_IGN: that one is inherited by what we start.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	stop, err := a.profile()
	if err != nil {
		return err
	}
	defer stop()
	return ended(ctx, serve(ctx, cfg, a.stdout, a.log))
}

// ended tells a daemon's end on request from a failure: once ctx is over,
// whatever came of that is what was asked for.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
