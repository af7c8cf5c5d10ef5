package main

import "github.com/ftckpt/ftckpt/internal/lab"

// helpers are the processes that ftckpt starts of itself, by the first
// argument they are started with. They are not commands: they come before
// the command line is looked at, take no settings and are in no help.
var helpers = map[string]func(args []string) int{
	lab.InitArg: lab.Main, // PID 1 of a host of the demo
}

// findHelper looks for the helper that argv asks for.
func findHelper(argv []string) (func([]string) int, bool) {
	if len(argv) < 2 {
		return nil, false
	}
	h, ok := helpers[argv[1]]
	return h, ok
}
