package e2e

import (
	"fmt"
	"testing"
	"time"
)

// Whatever a connection is in the middle of, it goes on with the next byte.
func TestDeathInTheMiddle(t *testing.T) {
	const size = 24 << 20
	for _, d := range deaths {
		t.Run(d.name, func(t *testing.T) {
			w := newWorld(t)
			redis, _, _ := w.pair()
			idle, up, down, full := w.dial(), w.dial(), w.dial(), w.dial()
			// Requests cut anywhere, inside of numbers and line ends too.
			var halves []*raw
			var requests [][]byte
			for i := range 6 {
				halves = append(halves, w.dial())
				requests = append(requests, command("SET", fmt.Sprintf("half%d", i), longName(halves[i].name(), 1+w.rng.IntN(4000))))
			}
			piped := w.dial()
			first, second := noise(w.seed, size), noise(w.seed+1, size)
			if err := <-down.upload("down", first, 0).done; err != nil {
				t.Fatal(err)
			}
			w.checkpoint(w.primary, w.standby)

			var cuts []int
			for i, k := range halves {
				cuts = append(cuts, 1+w.rng.IntN(len(requests[i])-1))
				w.must(k.send(requests[i][:cuts[i]]))
			}
			resume := make(chan struct{})
			uploading := up.upload("up", second, 2*time.Second)
			downloading := down.download("down", first, 2*time.Second, 0, nil)
			stopped := full.download("down", first, 0, 1<<20, resume) // and so its window is shut
			w.reached(stopped, 1<<20)
			at := int64(size/4 + w.rng.IntN(size/4))
			w.reached(uploading, at)
			w.reached(downloading, at/2)
			for i := range 200 {
				w.must(piped.send(command("ECHO", fmt.Sprintf("piped %d", i))))
			}
			d.do(w, redis)
			w.takenOver(w.standby, 0)

			for i, k := range halves {
				w.check(k.send(requests[i][cuts[i]:]), k.expect([]byte("+OK\r\n")))
			}
			for i := range 200 {
				w.check(piped.expect(bulk(fmt.Sprintf("piped %d", i))))
			}
			w.check(idle.quiet(), idle.ask("still here"))
			close(resume)
			w.check(<-uploading.done, <-downloading.done, <-stopped.done)
			// The server holds what it said it holds.
			for i, k := range halves {
				w.check(k.get(fmt.Sprintf("half%d", i), setValue(requests[i])), k.quiet())
			}
			w.check(up.get("up", second), down.ask("and on"), full.ask("and on"), idle.get("down", first))
		})
	}
}

// setValue is the value in the wire form of a SET.
func setValue(request []byte) []byte {
	var keyLen, valueLen int
	if _, err := fmt.Sscanf(string(request), "*3\r\n$3\r\nSET\r\n$%d\r\n", &keyLen); err != nil {
		panic(err)
	}
	rest := request[len(fmt.Sprintf("*3\r\n$3\r\nSET\r\n$%d\r\n", keyLen))+keyLen+2:]
	if _, err := fmt.Sscanf(string(rest), "$%d\r\n", &valueLen); err != nil {
		panic(err)
	}
	return rest[len(fmt.Sprintf("$%d\r\n", valueLen)):][:valueLen]
}
