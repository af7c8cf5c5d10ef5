// Package exitcode carries the program's exit status inside an error, so that
// the place that knows what went wrong chooses the status and only main exits.
//
// The numbers are a contract with scripts: they never change meaning.
package exitcode

import (
	"errors"
	"fmt"
)

// Code is a process exit status.
type Code int

// The exit statuses of ftckpt.
const (
	OK          Code = 0 // done
	Failed      Code = 1 // it failed while running
	Usage       Code = 2 // the command line is wrong
	Config      Code = 3 // a setting has a value that cannot work
	Unsuitable  Code = 4 // this host or this process cannot be protected
	Unprotected Code = 5 // running but unprotected
	Fenced      Code = 6 // another node is the primary
)

// Error is an error that says which status the program must exit with. A nil
// Err means that everything worth saying was already printed.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("exit status %d", e.Code)
	}
	return e.Err.Error()
}

// Unwrap gives the cause to errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Err }

// Errorf is fmt.Errorf with a status; %w works.
func Errorf(code Code, format string, args ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, args...)}
}

// Wrap gives err the status code. A nil err stays nil, and a status that err
// already carries is kept: the innermost place knew best.
func Wrap(code Code, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*Error](err); ok {
		return err
	}
	return &Error{Code: code, Err: err}
}

// Quiet is an error without a message: the result was printed, only the status
// is left to tell.
func Quiet(code Code) error {
	if code == OK {
		return nil
	}
	return &Error{Code: code}
}

// Of is the status to exit with for err: OK for nil, the status of the
// outermost *Error in its chain, and Failed for any other error.
func Of(err error) Code {
	if err == nil {
		return OK
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return Failed
}

// Message is what to tell a person about err, "" for an error made by Quiet.
func Message(err error) string {
	if e, ok := err.(*Error); ok && e.Err == nil { //nolint:errorlint // a Quiet that was wrapped was given a message
		return ""
	}
	if err == nil {
		return ""
	}
	return err.Error()
}
