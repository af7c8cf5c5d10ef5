package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Capture is a running packet capture.
type Capture struct {
	cmd  *Cmd
	file string
}

// captureStart bounds tcpdump's start.
const captureStart = 10 * time.Second

// Capture writes what passes the host's port of the switch to a pcap file
// (relative names are in LogDir), until Stop. It is taken at the switch, so it
// shows what the network saw and survives the host's death. It needs tcpdump.
func (h *Host) Capture(file string) (*Capture, error) {
	if !filepath.IsAbs(file) {
		file = filepath.Join(h.lab.logDir, file)
	}
	onSwitch := &Host{lab: h.lab, name: "switch", space: h.lab.sw}
	// -U: what was captured before a kill is in the file. -Z root: tcpdump
	// otherwise becomes another user, who may not write here.
	cmd := onSwitch.Command("tcpdump", "-i", h.name, "-U", "-Z", "root", "-B", "8192", "-s", "0", "-w", file)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("capture %s (is tcpdump installed?): %w", h.name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), captureStart)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	// "listening on" is when the socket is open; nothing after it is missed.
	r := bufio.NewReader(stderr)
	for said := ""; ; {
		line, err := r.ReadString('\n')
		if strings.Contains(line, "listening on") {
			break
		}
		said += line
		if err != nil {
			return nil, fmt.Errorf("capture %s: tcpdump: %s (%w)", h.name, strings.TrimSpace(said), errors.Join(cmd.Wait(), ctx.Err()))
		}
	}
	go func() { _, _ = io.Copy(io.Discard, r) }() // until tcpdump ends
	return &Capture{cmd: cmd, file: file}, nil
}

// File is the capture's file.
func (c *Capture) File() string { return c.file }

// Stop ends the capture and removes its file unless keep (of a failed run).
func (c *Capture) Stop(keep bool) error {
	if err := c.cmd.Process.Signal(unix.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop capture: %w", err)
	}
	err := c.cmd.Wait()
	if !keep {
		return os.Remove(c.file)
	}
	if err != nil {
		return fmt.Errorf("stop capture: %w", err)
	}
	return nil
}
