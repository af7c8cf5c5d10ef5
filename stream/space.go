package stream

import "time"

// Space is how much room the embedded server's store directory has. JetStream
// itself gives no error on a full disk, only silence.
type Space struct {
	Free uint64 // octets
	Low  bool
}

// spaceEvery is how often the free space is looked at.
const spaceEvery = time.Second

// lowSpace decides with a margin of a quarter, so that a file system at the
// limit does not make the state flap.
func lowSpace(low bool, free, min uint64) bool {
	if low {
		return free < min+min/4
	}
	return free < min
}

// Space is the latest look at the store directory, about a second old at most.
func (s *Server) Space() Space {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.space
}

func (s *Server) watchSpace(min uint64, changed func(Space)) {
	defer close(s.done)
	if first := s.Space(); first.Low && changed != nil {
		changed(first)
	}
	t := time.NewTicker(spaceEvery)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		s.mu.Lock()
		was := s.space.Low
		s.space.Free = freeSpace(s.dir)
		s.space.Low = lowSpace(was, s.space.Free, min)
		now := s.space
		s.mu.Unlock()
		if now.Low != was && changed != nil {
			changed(now)
		}
	}
}
