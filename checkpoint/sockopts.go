package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
)

// SocketOptions are socket options that CRIU does not carry over, of all the
// sockets that have the same ones.
type SocketOptions struct {
	Inodes []uint32 `json:"inodes"` // Socket.Inode
	// Set are integer options, by the names of optionTable, that differ from what a
	// new socket has.
	Set map[string]int `json:"set,omitempty"`
	// Congestion is the name of the congestion control algorithm.
	Congestion string `json:"congestion,omitempty"`
}

// Bounds of what is believed of a manifest's socket options.
const (
	maxOptionGroups = 4096
	maxOptionNames  = 64
	maxCongestion   = 15 // TCP_CA_NAME_MAX less the terminating zero
)

// equal reports whether o's values are those of p.
func (o *SocketOptions) equal(p *SocketOptions) bool {
	return o.Congestion == p.Congestion && maps.Equal(o.Set, p.Set)
}

// group adds one socket's options to those of others. Most sockets of a service
// have the same ones, so a search through the few groups is short.
func group(all []SocketOptions, inode uint32, o SocketOptions) []SocketOptions {
	for i := range all {
		if all[i].equal(&o) {
			all[i].Inodes = append(all[i].Inodes, inode)
			return all
		}
	}
	if len(all) == maxOptionGroups {
		return all // sockets beyond this many sorts come back with defaults
	}
	o.Inodes = []uint32{inode}
	return append(all, o)
}

func (m Manifest) validOptions() error {
	if len(m.SocketOptions) > maxOptionGroups {
		return fmt.Errorf("%w: %d sorts of socket options", ErrManifest, len(m.SocketOptions))
	}
	n := 0
	for _, o := range m.SocketOptions {
		n += len(o.Inodes)
		if n > maxConns || len(o.Set) > maxOptionNames || len(o.Congestion) > maxCongestion {
			return fmt.Errorf("%w: socket options of %d sockets", ErrManifest, n)
		}
	}
	return nil
}

// openSocket is where a process of an image has a socket open.
type openSocket struct {
	pid   int // in the image's PID namespace
	fd    int
	inode uint32
}

// socketPlaces finds, for every TCP socket of an image, one descriptor of it.
func socketPlaces(dir string) ([]openSocket, error) {
	files, err := decodeAll[fdinfo.FileEntry](dir, "files.img", magicFiles)
	if err != nil {
		return nil, err
	}
	inodes := map[uint32]uint32{} // by the image's name for the open file
	for _, f := range files {
		if sk := f.GetIsk(); f.GetType() == fdinfo.FdTypes_INETSK && sk.GetProto() == protoTCP {
			inodes[f.GetId()] = sk.GetIno()
		}
	}
	tree, err := ReadTree(dir)
	if err != nil {
		return nil, err
	}
	var out []openSocket
	for _, t := range tree {
		ids, err := decodeAll[criucore.TaskKobjIdsEntry](dir, fmt.Sprintf("ids-%d.img", t.PID), magicIDs)
		if errors.Is(err, fs.ErrNotExist) || err == nil && len(ids) != 1 {
			continue // a zombie
		}
		if err != nil {
			return nil, err
		}
		fds, err := decodeAll[fdinfo.FdinfoEntry](dir, fmt.Sprintf("fdinfo-%d.img", ids[0].GetFilesId()), magicFDInfo)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			inode, yes := inodes[fd.GetId()]
			if !yes || fd.GetType() != fdinfo.FdTypes_INETSK || fd.GetFd() > maxFD {
				continue
			}
			delete(inodes, fd.GetId()) // one descriptor will do
			out = append(out, openSocket{pid: t.PID, fd: int(fd.GetFd()), inode: inode})
		}
	}
	slices.SortFunc(out, func(a, b openSocket) int { return a.pid - b.pid })
	return out, nil
}

// maxFD bounds a descriptor's number (the kernel's own bound of fs.nr_open).
const maxFD = 1 << 30
