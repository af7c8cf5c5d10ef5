package loadgen

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"
)

// Arg is the hidden first argument that makes ftckpt a load generator.
const Arg = "lab-loadgen"

// maxConfig bounds the first line of the input.
const maxConfig = 1 << 16

// Main is the load generator as a process: a line of stdin is the Config; any
// further line, or the end, stops the run. It writes Messages to stdout, one a
// line, and returns an exit code. It takes no arguments. ctx aborts it.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) int {
	enc := json.NewEncoder(stdout)
	fail := func(code int, err error) int {
		_ = enc.Encode(Message{Event: "error", Time: time.Now(), Error: err.Error()})
		return code
	}
	if len(args) != 0 {
		return fail(2, fmt.Errorf("%s is internal to ftckpt's lab", Arg))
	}
	in := bufio.NewScanner(stdin)
	in.Buffer(nil, maxConfig)
	if !in.Scan() {
		return fail(2, fmt.Errorf("read load: %w", io.ErrUnexpectedEOF))
	}
	var cfg Config
	if err := json.Unmarshal(in.Bytes(), &cfg); err != nil {
		return fail(2, fmt.Errorf("read load: %w", err))
	}
	stop := make(chan struct{})
	go func() {
		in.Scan()
		close(stop)
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	res, err := Run(ctx, cfg, stop, func(m Message) {
		if err := enc.Encode(m); err != nil {
			cancel(fmt.Errorf("report progress: %w", err)) // nobody listens
		}
	})
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fail(1, err)
	}
	if err := enc.Encode(Message{Event: "result", Time: res.Ended, Result: &res}); err != nil {
		return 1
	}
	return 0
}

// Hook turns the process into a load generator, and never returns, if it was
// started as one: for TestMain and for main, as lab.Hook.
func Hook() {
	if len(os.Args) > 1 && os.Args[1] == Arg {
		os.Exit(Main(context.Background(), os.Args[2:], os.Stdin, os.Stdout))
	}
}
