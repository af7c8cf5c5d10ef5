// Command simulate runs schedules of the protocol's simulator: one seed after the
// other until the time is up, or the one it is told to. Its last line is a JSON
// object; its exit status is 1 when a promise was broken.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/ftckpt/ftckpt/internal/sim"
)

// shrinkTries bounds the runs that go into making a failing schedule shorter.
const shrinkTries = 3000

// result is the last line.
type result struct {
	Schedules  uint64 `json:"schedules"`
	Violations uint64 `json:"violations"`
	Seed       uint64 `json:"seed"` // the first; of a violation, if there is one
	Takeovers  uint64 `json:"takeovers"`
	Lost       uint64 `json:"lost"` // services that the faults left nobody to serve
	PerMinute  uint64 `json:"per_minute"`
}

func main() {
	seconds := flag.Float64("seconds", 60, "how long to run")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano())>>16, "first seed")
	one := flag.Bool("one", false, "run the schedule of this seed only, and tell what happens")
	keep := flag.Bool("keep-going", false, "count violations, and tell of the first only")
	schedules := flag.Uint64("schedules", 0, "run so many schedules, however long that takes")
	shrink := flag.Bool("shrink", true, "make a failing schedule shorter")
	flag.Parse()
	if *one {
		os.Exit(replay(*seed))
	}
	o := options{*seed, time.Duration(*seconds * float64(time.Second)), *schedules, *keep, *shrink}
	os.Exit(o.run())
}

type options struct {
	seed         uint64
	d            time.Duration
	schedules    uint64
	keep, shrink bool
}

func (o *options) run() int {
	r := result{Seed: o.seed}
	begin := time.Now()
	more := func() bool {
		if o.schedules > 0 {
			return r.Schedules < o.schedules
		}
		return time.Since(begin) < o.d
	}
	for seed := o.seed; more(); seed++ {
		s := sim.Generate(seed)
		out := sim.Run(s, nil)
		r.Schedules++
		r.Takeovers += uint64(out.Takeovers)
		if out.Lost {
			r.Lost++
		}
		if v := out.Violation; v != nil {
			r.Violations++
			if r.Violations == 1 {
				r.Seed = seed
				fmt.Printf("seed %d: %v\n", seed, v)
				if o.shrink {
					tell(s, v)
				}
			} else {
				fmt.Printf("seed %d: %.200s\n", seed, v)
			}
			if !o.keep {
				break
			}
		}
	}
	r.PerMinute = uint64(float64(r.Schedules) / time.Since(begin).Minutes())
	b, _ := json.Marshal(r)
	fmt.Println(string(b))
	if r.Violations > 0 {
		return 1
	}
	return 0
}

// tell makes a failing schedule shorter and prints what happens in it.
func tell(s *sim.Schedule, v *sim.Violation) {
	short := sim.Shrink(s, v.Promise, shrinkTries)
	fmt.Printf("shortest schedule found (replay the whole one: make sim SEED=%d ONE=1)\n%s", s.Seed, short)
	out := sim.Run(short, func(line string) { fmt.Println(line) })
	fmt.Printf("%v\n", out.Violation)
}

func replay(seed uint64) int {
	out := sim.Run(sim.Generate(seed), func(line string) { fmt.Println(line) })
	if out.Violation != nil {
		fmt.Println(out.Violation)
		return 1
	}
	fmt.Printf("%d takeovers, lost: %v\n", out.Takeovers, out.Lost)
	return 0
}
