package stream

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
)

// image is 30 % zero, 40 % soft, 30 % hard, page by page.
func image(size int) []byte {
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 1))
	words := []byte("malloc free struct pointer 0x7fff00 GET /index.html HTTP/1.1 heap object string table entry ")
	for o := 0; o+4096 <= size; o += 4096 {
		p := b[o : o+4096]
		switch x := r.IntN(10); {
		case x < 3:
			be.PutUint64(p, uint64(o)|1)
		case x < 7:
			for i := 0; i < len(p); {
				k := r.IntN(len(words) - 12)
				i += copy(p[i:], words[k:k+12])
			}
		default:
			for i := 0; i < len(p); i += 8 {
				be.PutUint64(p[i:], r.Uint64())
			}
		}
	}
	return b
}

func BenchmarkStore(b *testing.B) {
	img := image(128 << 20)
	for name, o := range map[string]StoreOptions{"raw": {}, "zstd": {Compress: true}} {
		s, err := StartServer(ServerOptions{StoreDir: b.TempDir(), Listen: "127.0.0.1:0"})
		if err != nil {
			b.Fatal(err)
		}
		defer s.Shutdown()
		l, err := Open(b.Context(), Config{Service: "bench", Join: s.JoinString()})
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		st := l.Store(o)
		chunks, _, err := st.PutReader(b.Context(), bytes.NewReader(img))
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name+"/put", func(b *testing.B) {
			b.SetBytes(int64(len(img)))
			for b.Loop() {
				if _, err := st.Collect(b.Context(), survey(b, st), func(Hash) bool { return false }); err != nil {
					b.Fatal(err)
				}
				var sent int64
				if chunks, sent, err = st.PutReader(b.Context(), bytes.NewReader(img)); err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(sent)/float64(len(img)), "sent/octet")
			}
		})
		b.Run(name+"/get", func(b *testing.B) {
			b.SetBytes(int64(len(img)))
			for b.Loop() {
				if err := st.CopyTo(b.Context(), io.Discard, chunks); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
