package sim

// Shrink drops steps of a failing schedule for as long as it still breaks the same
// promise, and answers the shortest that was found. It runs at most tries
// schedules.
func Shrink(s *Schedule, promise, tries int) *Schedule {
	fails := func(c *Schedule) *Violation {
		if tries--; tries < 0 {
			return nil
		}
		if v := Run(c, nil).Violation; v != nil && v.Promise == promise {
			return v
		}
		return nil
	}
	best := *s
	cut := func(v *Violation) { // what comes after the violation is of no account
		if v.Step+1 < len(best.Steps) {
			best.Steps = best.Steps[:v.Step+1]
		}
	}
	v := fails(&best)
	if v == nil {
		return s
	}
	cut(v)
	for size := max(len(best.Steps)/2, 1); ; size = max(size/2, 1) {
		dropped := false
		for at := len(best.Steps) - size; at > -size && tries > 0; at -= size {
			from, to := max(at, 0), min(at+size, len(best.Steps))
			if from >= to {
				continue
			}
			c := best
			c.Steps = append(append([]Step(nil), best.Steps[:from]...), best.Steps[to:]...)
			if v := fails(&c); v != nil {
				best = c
				cut(v)
				dropped = true
			}
		}
		if size == 1 && !dropped || tries <= 0 {
			return &best
		}
	}
}
