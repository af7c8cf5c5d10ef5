package north

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bits of a record's length in a BPF ring buffer (include/uapi/linux/bpf.h).
const (
	ringBusy    = 1 << 31
	ringDiscard = 1 << 30
	ringHeader  = 8
)

// busySpins is how often a record that is being written is looked at before the
// processor is given up: its writer may have been preempted.
const busySpins = 200

// ring reads a BPF ring buffer without being woken by it. cilium/ebpf's reader
// stops at a record that is being written; what is behind that one may be the
// cause of a segment which is about to be judged.
type ring struct {
	consumer, producer *uint64
	data               []byte
	mask               uint64
	maps               [2][]byte
}

func newRing(fd, size int) (*ring, error) {
	page := unix.Getpagesize()
	c, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the consumer's page of the ring: %w", err)
	}
	p, err := unix.Mmap(fd, int64(page), page+2*size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		_ = unix.Munmap(c)
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	return &ring{
		consumer: (*uint64)(unsafe.Pointer(&c[0])), producer: (*uint64)(unsafe.Pointer(&p[0])),
		data: p[page:], mask: uint64(size - 1), maps: [2][]byte{c, p},
	}, nil
}

// drain hands over every record that was begun before the call, waiting for
// those that are being written. The data is good for the call of f only.
func (r *ring) drain(f func([]byte)) {
	end := atomic.LoadUint64(r.producer)
	at := atomic.LoadUint64(r.consumer)
	for spins := 0; at < end; {
		o := at & r.mask
		h := atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.data[o])))
		if h&ringBusy != 0 {
			if spins++; spins%busySpins == 0 {
				_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			}
			continue
		}
		n := uint64(h &^ (ringBusy | ringDiscard))
		if h&ringDiscard == 0 {
			f(r.data[o+ringHeader : o+ringHeader+n])
		}
		at += ringHeader + (n+7)&^7
		atomic.StoreUint64(r.consumer, at)
	}
}

func (r *ring) close() error {
	err := unix.Munmap(r.maps[0])
	if e := unix.Munmap(r.maps[1]); err == nil {
		err = e
	}
	return err
}
