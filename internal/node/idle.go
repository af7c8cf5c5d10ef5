package node

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// idle reports whether no thread of a process tree is running or about to: the
// server has done all it could with what it was given, and waits.
func idle(pid int) bool {
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/[0-9]*")
	if err != nil {
		return true
	}
	for _, t := range tasks {
		stat, err := os.ReadFile(t + "/stat")
		if err != nil {
			continue // it has ended
		}
		// The name is in brackets and may hold anything (proc(5)).
		if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) && (stat[i+2] == 'R' || stat[i+2] == 'D') {
			return false
		}
		children, err := os.ReadFile(t + "/children")
		if err != nil {
			continue
		}
		for _, c := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(c); err == nil && !idle(n) {
				return false
			}
		}
	}
	return true
}
