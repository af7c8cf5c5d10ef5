package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/ftckpt/ftckpt/checkpoint/check"
	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/internal/loadgen"
	"github.com/ftckpt/ftckpt/replay/capsule"
)

// becomeHelper does not return in the processes that ftckpt starts of itself.
// They are told by a hidden first argument and are not commands: they come
// before anything else of the process is set up, take no settings and are in
// no help.
func becomeHelper() {
	check.Main()      // the process that "ftckpt check" dumps and restores
	capsule.RunInit() // PID 1 of the place where a standby restores
	lab.Hook()        // PID 1 of a host of the demo
	if len(os.Args) > 1 && os.Args[1] == loadgen.Arg {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		code := loadgen.Main(ctx, os.Args[2:], os.Stdin, os.Stdout)
		stop()
		os.Exit(code)
	}
}
