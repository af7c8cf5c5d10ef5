// Package checkpoint makes generations of a protected service: it dumps and
// restores process trees with CRIU, reads and patches CRIU's images, packs them
// into a content-addressed chunk store and back, and says which generations a
// recovery may still need.
//
// What it promises. A dump leaves the target running and untraced whether it
// succeeds, fails or is cancelled. A generation that Download hands over has
// every byte that Upload was given. Nothing read from a store or an image is
// trusted: sizes are bounded and hashes verified.
//
// What its caller must do. Hold the service's packets from DumpRequest.Hold on
// until Dump returns (input that TCP acknowledges after CRIU has read a socket
// is in nobody's image). Keep the service's port closed on the restoring host
// until the restored connections are to be live. Give up a capsule in which a
// restore failed or was cancelled: what is left in it is half a process tree.
//
// Files ending in _linux.go are the thin edge to the kernel and CRIU; the rest
// is decoding and arithmetic over files and values.
package checkpoint
