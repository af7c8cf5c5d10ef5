// Package node is the two composition roots: the primary and the standby.
// They wire the rooms together and hold no protocol: what to log, hold, drop
// or inject is decided by tcpwrap.Machine and replay.Engine, who is the primary
// by stream.Writer, what is garbage by checkpoint's rule.
package node
