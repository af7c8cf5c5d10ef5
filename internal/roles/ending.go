package roles

import (
	"errors"

	"github.com/ftckpt/ftckpt/stream"
)

// Ending is what becomes of a primary's host when its tenure ends.
type Ending uint8

// Endings.
const (
	// Leave: another node is the primary. The address, the sockets and the rules
	// leave this host, in that order, and nothing reaches a client.
	Leave Ending = iota + 1
	// Close: nobody here can know who is the primary. The rules stay and drop all.
	Close
	// Release: protection has ended, and the log says so: all that was held leaves
	// and the server goes on without us.
	Release
)

// AfterEnd is the ending of a primary whose Writer or packet queue has ended with
// err.
func AfterEnd(err error) Ending {
	if errors.Is(err, stream.ErrFenced) {
		return Leave
	}
	return Close
}

// AfterGoodbye is the ending of a primary that was told to stop. err is what came
// of waiting until its Goodbye record was stable: only then can no standby take
// over any more.
func AfterGoodbye(err error) Ending {
	if err == nil {
		return Release
	}
	return AfterEnd(err)
}
