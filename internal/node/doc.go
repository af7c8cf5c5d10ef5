// Package node is the two composition roots: the primary and the standby.
package node

import (
	"context"
	"errors"
	"io"
	"log/slog"

	"github.com/ftckpt/ftckpt/internal/config"
)

// Protect runs the primary until ctx ends or it is fenced.
func Protect(_ context.Context, _ config.Protect, _ io.Writer, _ *slog.Logger) error {
	return errors.New("protect: the primary is not wired in this build")
}

// Standby runs the standby, and the primary it may become, until ctx ends.
func Standby(_ context.Context, _ config.Standby, _ io.Writer, _ *slog.Logger) error {
	return errors.New("standby: the standby is not wired in this build")
}
