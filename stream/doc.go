// Package stream is the stable log and the arbiter: a service's records in one
// total order in JetStream, written by one primary at a time, and beside them
// its checkpoint images and the heartbeats of its nodes.
//
// # What it promises
//
//   - One writer. Acquire appends a fence of the next epoch; from then on no
//     append of an older Writer is stored. Of several nodes that call AcquireIf
//     with the same fence, one wins. Detection (Beacon, Detector) is a hint and
//     nothing rests on it.
//   - Stable means acknowledged by JetStream, with all before it. What that
//     survives is the server's affair: see the table below.
//   - Nothing lost, nothing twice, no hole, however the server or the network
//     fails, for as long as the Writer lives. A Reader that would have to skip
//     a position says so (ErrHole, ErrPurged) instead.
//   - What is read is not trusted: lengths are bounded, batches carry a
//     checksum, chunks are checked against their hash.
//
// # What its caller must do
//
//   - Give Append dense positions, beginning at Writer.Next.
//   - Bound what it appends by Writer.Backlog; a log that is full or cannot be
//     reached holds everything and grows no further than Config.MaxBacklog.
//   - Collect (Writer.Purge, Store.Collect) only behind a stable generation,
//     only as the primary, and never beside an upload.
//   - On OnEnd with ErrFenced, release nothing more.
//
// # What stable survives
//
//	setting                        kill -9 of the server   power loss of the log's host
//	one replica, SyncInterval      yes                     all but about the last second
//	one replica, SyncAlways        yes                     yes
//	three replicas (a cluster)     yes                     of one host
//
// A server embedded on one of two hosts cannot arbitrate a partition between
// them without holding up the other side: that takes a third host.
//
// # How it is built
//
// codec.go, batch.go and chunk.go are the wire format (docs/WIRE.md),
// machine.go is the Writer's logic, follower.go the Reader's, detector.go the
// suspicion: all pure. writer.go, reader.go, fence.go, exchange.go, store.go,
// beacon.go and log.go put them on JetStream; conn.go is the one place that
// connects; server.go embeds a server.
package stream
