package loadgen

// Samples are latencies over time, in bounded memory. When they no longer fit,
// each two neighbours become the slower of them, so a stall is never lost.
type Samples struct {
	AtUS   []int64 `json:"at_us"`   // when the request began, since Result.Started
	TookUS []int64 `json:"took_us"` // until its reply was complete
	Stride int     `json:"stride"`  // requests per sample: each is the slowest of so many

	limit   int
	pending int // requests since the last sample was begun
}

func newSamples(limit int) Samples { return Samples{Stride: 1, limit: limit} }

// add notes one request.
func (s *Samples) add(atUS, tookUS int64) {
	if n := len(s.AtUS); s.pending > 0 {
		if tookUS > s.TookUS[n-1] {
			s.AtUS[n-1], s.TookUS[n-1] = atUS, tookUS
		}
	} else {
		if n >= s.limit {
			s.thin()
		}
		s.AtUS = append(s.AtUS, atUS)
		s.TookUS = append(s.TookUS, tookUS)
	}
	s.pending = (s.pending + 1) % s.Stride
}

func (s *Samples) thin() {
	n := 0
	for i := 0; i < len(s.AtUS); i += 2 {
		j := i
		if i+1 < len(s.AtUS) && s.TookUS[i+1] > s.TookUS[i] {
			j = i + 1
		}
		s.AtUS[n], s.TookUS[n] = s.AtUS[j], s.TookUS[j]
		n++
	}
	s.AtUS, s.TookUS = s.AtUS[:n], s.TookUS[:n]
	s.Stride *= 2
}
