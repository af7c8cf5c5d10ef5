package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ftckpt/ftckpt/stream"
)

// ghostArg makes the test binary a standby that says it has every generation and
// never takes over.
const ghostArg = "ghost-standby"

// ghost runs it: ghost-standby NODE, with the join string in FTCKPT_JOIN.
func ghost(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	lg, err := stream.Open(ctx, stream.Config{Service: "default", Join: os.Getenv("FTCKPT_JOIN")})
	if err != nil {
		return err
	}
	defer lg.Close()
	beat, err := json.Marshal(map[string]any{"mode": "warm", "generation": 1 << 40, "last": 1 << 40})
	if err != nil {
		return err
	}
	if err := lg.StartBeacon(ctx, "standby", args[0], 20*time.Millisecond, func() []byte { return beat }); err != nil {
		return err
	}
	fmt.Println("here")
	<-ctx.Done()
	return nil
}
