// Package loadgen is the clients of a redis server that check every byte they
// get, for the demo, the end-to-end tests and the benchmarks.
//
// Each connection has keys of its own, so that what the server must answer
// follows from what that connection has asked before, and is compared with what
// it did answer, exactly. Kinds of connection:
//
//   - redis: the go-redis library, a pool of one connection, no retries; random
//     commands, pipelines, and now and then a value of up to 1 MB.
//   - idle: the same, which sleeps most of the time.
//   - upload: a raw connection that SETs a large value slowly, then reads it
//     back: a request that is under way nearly all the time.
//   - download: a raw connection that GETs a large value and reads it slowly: a
//     reply that is under way nearly all the time.
//   - half: a raw connection that sends part of a command, waits, and sends the
//     rest.
//   - sleep: a raw connection with one exchange at its beginning and one at the
//     end of the run, for thousands of connections that merely have to survive.
//     It is left out of Message.Oldest, having nothing to say meanwhile.
//
// A lost connection is a reset, whatever ended it: it is counted, dialled again,
// and its keys start anew, because the fate of the request under way is unknown.
// A reply that is late is not an error; how late is what is being measured.
//
// The clients of a run are one process (Main), started on the host they are to
// be clients on; Follow reads what it prints. Times are of the machine's clock,
// intervals of the monotonic one.
package loadgen
