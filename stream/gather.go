package stream

import "time"

const (
	// mostGather bounds how long a batch waits for more.
	mostGather = 250 * time.Microsecond
	// fewClients is how many clients' records a batch must have had for its
	// successor to wait: one that speaks alone has nobody to wait for.
	fewClients = 2
	// bestKept is how long the quickest answer counts.
	bestKept = 5 * time.Second
)

// gathering makes the records of many clients wait a little for one another,
// but only where that pays: while the log answers later than it can, because
// processors or disks are short, each batch that is saved makes it answer
// sooner. A log that answers as soon as it can is not made to wait, nor is a
// client that is alone. It is pure.
type gathering struct {
	mean   time.Duration // from publishing to acknowledgement, smoothed
	best   time.Duration // the quickest of late
	bestAt time.Time
	peak   int // clients' records in one batch, the most of late
	until  time.Time
}

// stored notes a batch of that many clients' records, acknowledged after took.
func (g *gathering) stored(now time.Time, took time.Duration, clients int) {
	if g.bestAt.IsZero() || took <= g.best || now.Sub(g.bestAt) > bestKept {
		g.best, g.bestAt = took, now
	}
	if g.mean == 0 {
		g.mean = took
	}
	g.mean += (took - g.mean) / 8
	g.peak = max(clients, g.peak-(g.peak+7)/8)
	g.until = now
	if clients >= fewClients {
		g.until = now.Add(min(max(2*(g.mean-g.best), 0), mostGather))
	}
}

// wait reports whether a batch of that many clients' records should wait until
// g.until. It need not when most of those who could come are there.
func (g *gathering) wait(now time.Time, clients int) bool {
	return now.Before(g.until) && 4*clients < 3*g.peak
}
