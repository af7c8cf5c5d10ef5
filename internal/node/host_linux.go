package node

import (
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ftckpt/ftckpt/internal/config"
	"github.com/ftckpt/ftckpt/tcpwrap"
)

const (
	// packetMark tells the rules which packets are our own ("ftck").
	packetMark = 0x6674636b
	// queueTries is how many queue numbers are tried: several instances may share
	// a network namespace.
	queueTries = 64
	// roomForImages is the free space, in octets, that a memory file system must
	// have for images to go into it.
	roomForImages = 1 << 30
)

// instance names what an installation leaves in the kernel: the service's name
// alone would make two instances with run directories of their own touch each
// other's rules.
func instance(name, runDir string) string {
	return fmt.Sprintf("%s.%06x", name, digest(runDir)&0xffffff)
}

func digest(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s)) // never fails
	return h.Sum32()
}

// openQueue takes a free packet queue of the network namespace, the same one
// at each start unless another process has it.
func openQueue(netns, name string) (*tcpwrap.NFQueue, uint16, error) {
	first := uint16(digest(name)) &^ (queueTries - 1)
	var last error
	for i := range uint16(queueTries) {
		n := first + i
		q, err := tcpwrap.OpenNFQueue(tcpwrap.NFQueueOptions{NetNS: netns, Queue: n, Mark: packetMark})
		if err == nil {
			return q, n, nil
		}
		last = err
		if !errors.Is(err, syscall.EPERM) {
			break
		}
	}
	return nil, 0, fmt.Errorf("open a packet queue: %w", last)
}

// imageDir makes an empty directory for images, in memory where there is room:
// a dump to a disk's file system waits for its write-back while the server
// stands still.
func imageDir(c config.Common, name string) (string, error) {
	base := filepath.Join(c.StateDir, "images")
	for _, dir := range []string{c.RunDir, "/dev/shm"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC && int64(st.Bavail)*st.Bsize >= roomForImages {
			base = filepath.Join(dir, "ftckpt-images-"+fmt.Sprintf("%08x", digest(c.RunDir)))
			break
		}
	}
	dir := filepath.Join(base, name)
	if err := os.RemoveAll(dir); err != nil { // of an agent that was killed
		return "", fmt.Errorf("clean up images: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make image directory: %w", err)
	}
	return dir, nil
}
