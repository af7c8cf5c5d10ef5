package north

// The C headers are those of libbpf-dev and linux-libc-dev; Debian keeps asm/
// in a folder per machine.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target amd64,arm64 -go-package north -type taken recorder recorder.bpf.c -- -O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu
