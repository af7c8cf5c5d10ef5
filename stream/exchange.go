package stream

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	window    = 32               // requests in flight
	resendIn  = 2 * time.Second  // without an answer a request is sent again
	giveUpIn  = 15 * time.Second // without any answer at all
	redialGap = 100 * time.Millisecond
)

// exchange keeps up to window requests in flight and gives each one's answer
// to its function, in the order of arrival, in the caller's goroutine. What
// goes unanswered is sent again, over a new connection if need be, so requests
// must be such that twice is as good as once. It is for one goroutine.
type exchange struct {
	dial  func(context.Context) (*conn, error)
	conn  *conn
	sub   *nats.Subscription
	inbox string
	ch    chan *nats.Msg

	next   uint64
	flight map[uint64]*request
	heard  time.Time
}

type request struct {
	msg  nats.Msg
	sent time.Time
	done func(*nats.Msg) error
}

func newExchange(dial func(context.Context) (*conn, error)) *exchange {
	return &exchange{dial: dial, flight: make(map[uint64]*request), heard: time.Now()}
}

// send puts a request in flight, waiting for room first. done hears the
// answer during this or a later call; its error ends that call.
func (x *exchange) send(ctx context.Context, subject string, data []byte, done func(*nats.Msg) error) error {
	for len(x.flight) >= window {
		if err := x.receive(ctx); err != nil {
			return err
		}
	}
	if len(x.flight) == 0 {
		x.heard = time.Now()
	}
	x.next++
	r := &request{msg: nats.Msg{Subject: subject, Data: data}, done: done}
	x.flight[x.next] = r
	if err := x.ensure(ctx); err != nil {
		return err
	}
	x.publish(x.next, r)
	return nil
}

// flush waits until nothing is in flight.
func (x *exchange) flush(ctx context.Context) error {
	for len(x.flight) > 0 {
		if err := x.receive(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (x *exchange) close() {
	if x.sub != nil {
		_ = x.sub.Unsubscribe() // an error means that the connection is gone, and the subscription with it
	}
}

func (x *exchange) publish(id uint64, r *request) {
	r.sent = time.Now()
	r.msg.Reply = x.inbox + strconv.FormatUint(id, 10)
	_ = x.conn.nc.PublishMsg(&r.msg) // an error means a lost connection; receive notices
}

// ensure makes a connection where there is none; all that is in flight is sent
// over it again.
func (x *exchange) ensure(ctx context.Context) error {
	for x.conn == nil || x.conn.nc.IsClosed() {
		c, err := x.dial(ctx)
		if err == nil {
			x.inbox = nats.NewInbox() + "."
			x.ch = make(chan *nats.Msg, 4*window)
			x.sub, err = c.nc.ChanSubscribe(x.inbox+"*", x.ch)
		}
		if err != nil {
			if err = classify(err); x.quiet() || ctx.Err() != nil {
				return err
			}
			select {
			case <-time.After(redialGap):
			case <-ctx.Done():
				return fmt.Errorf("%w: %w", ctx.Err(), err)
			}
			continue
		}
		x.conn = c
		for id, r := range x.flight {
			x.publish(id, r)
		}
	}
	return nil
}

func (x *exchange) quiet() bool { return time.Since(x.heard) > giveUpIn }

// receive takes one answer, or looks after what goes without one.
func (x *exchange) receive(ctx context.Context) error {
	if err := x.ensure(ctx); err != nil {
		return err
	}
	select {
	case m := <-x.ch:
		return x.answer(m)
	default:
	}
	t := time.NewTimer(resendIn / 4)
	defer t.Stop()
	select {
	case m := <-x.ch:
		return x.answer(m)
	case <-x.conn.lost:
	case <-t.C:
		if x.quiet() {
			return fmt.Errorf("%w: no answer for %v", ErrUnreachable, giveUpIn)
		}
		for id, r := range x.flight {
			if time.Since(r.sent) > resendIn {
				x.publish(id, r)
			}
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// answered is the request that m answers, 0 (which none has) if it is none.
func (x *exchange) answered(m *nats.Msg) uint64 {
	id, err := strconv.ParseUint(strings.TrimPrefix(m.Subject, x.inbox), 10, 64)
	if err != nil {
		return 0
	}
	return id
}

func (x *exchange) answer(m *nats.Msg) error {
	id := x.answered(m)
	r := x.flight[id]
	if r == nil {
		return nil // a second answer to what was sent twice
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		return nil // nobody there just now: it will be sent again
	}
	x.heard = time.Now()
	delete(x.flight, id)
	return r.done(m)
}
