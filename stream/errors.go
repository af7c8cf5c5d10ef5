package stream

import "errors"

// What can be wrong with a log. Every error of this package wraps one of
// these, a context error, or is a caller's mistake and says so.
var (
	// ErrUnreachable: no answer from the log's server. Try again; a Writer does.
	ErrUnreachable = errors.New("log unreachable")
	// ErrRefused: the server answers and will not have us: wrong secret, wrong
	// certificate, no JetStream, no permission. Trying again does not help.
	ErrRefused = errors.New("log refused us")
	// ErrFull: the stream is at its limit of bytes. Nothing is lost; collect.
	ErrFull = errors.New("log full")
	// ErrFenced: another node has appended a later fence. Final for a Writer.
	ErrFenced = errors.New("fenced: another node is the primary")
	// ErrRolledBack: the log lacks what it had acknowledged, as after a power
	// loss of a log host that does not sync always. A Writer holds then; the way
	// out is to acquire again and to begin with a new generation.
	ErrRolledBack = errors.New("log has gone back")
	// ErrClosed: the Writer, Reader, Log or Server was closed by its owner.
	ErrClosed = errors.New("closed")
	// ErrBacklog: a Writer holds Config.MaxBacklog octets that are not stable
	// yet and takes no more. The position is not used up.
	ErrBacklog = errors.New("log backlog full")
	// ErrOrder: a position given to Append is not the one that comes next.
	ErrOrder = errors.New("position out of order")
	// ErrInvalid: a record, name or setting is outside its bounds.
	ErrInvalid = errors.New("invalid")
	// ErrHole: positions are missing in the log where there must be none.
	ErrHole = errors.New("hole in the log")
	// ErrPurged: the place asked for has been collected.
	ErrPurged = errors.New("log was collected there")
	// ErrCorrupt: what was read fails its checksum, its hash or its format.
	ErrCorrupt = errors.New("corrupt")
	// ErrVersion: what was read is of a format or kind this program is too old
	// for. It wraps nothing of ErrCorrupt: the data may be sound.
	ErrVersion = errors.New("unknown version")
	// ErrMissing: there is no such chunk, blob or fence.
	ErrMissing = errors.New("missing")
)
