package main

import (
	"github.com/ftckpt/ftckpt/internal/lab"
	"github.com/ftckpt/ftckpt/replay/capsule"
)

// becomeHelper does not return in the processes that ftckpt starts of itself.
// They are told by a hidden first argument and are not commands: they come
// before anything else of the process is set up, take no settings and are in
// no help.
func becomeHelper() {
	capsule.RunInit() // PID 1 of the place where a standby restores
	lab.Hook()        // PID 1 of a host of the demo
}
