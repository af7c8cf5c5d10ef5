package checkpoint

import (
	"errors"
	"runtime"
	"sync"
)

// few is how much work is not worth another goroutine.
const few = 64

// inParallel calls f(0) to f(n-1), each once, from as many goroutines as there
// are processors. After an error it calls no more than were begun.
func inParallel(n int, f func(i int) error) error {
	workers := min(runtime.GOMAXPROCS(0), (n+few-1)/few)
	errs := make([]error, max(workers, 1))
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w * n / workers; i < (w+1)*n/workers && errs[w] == nil; i++ {
				errs[w] = f(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
