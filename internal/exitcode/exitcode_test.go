package exitcode

import (
	"errors"
	"fmt"
	"testing"
)

func TestOf(t *testing.T) {
	cause := errors.New("cause")
	fenced := Errorf(Fenced, "append batch: %w", cause)
	tests := []struct {
		name string
		err  error
		code Code
		msg  string
	}{
		{"nil", nil, OK, ""},
		{"plain", cause, Failed, "cause"},
		{"typed", fenced, Fenced, "append batch: cause"},
		{"wrapped by fmt", fmt.Errorf("protect redis: %w", fenced), Fenced, "protect redis: append batch: cause"},
		{"joined", errors.Join(cause, fenced), Fenced, "cause\nappend batch: cause"},
		{"wrap plain", Wrap(Config, cause), Config, "cause"},
		{"wrap keeps the inner status", Wrap(Failed, fenced), Fenced, "append batch: cause"},
		{"wrap nil", Wrap(Failed, nil), OK, ""},
		{"quiet", Quiet(Unprotected), Unprotected, ""},
		{"quiet ok", Quiet(OK), OK, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := Of(tt.err); got != tt.code {
				t.Errorf("Of = %d, want %d", got, tt.code)
			}
			if got := Message(tt.err); got != tt.msg {
				t.Errorf("Message = %q, want %q", got, tt.msg)
			}
		})
	}
	if !errors.Is(Wrap(Config, cause), cause) {
		t.Error("Wrap hides its cause from errors.Is")
	}
}
