package reqsk

// Support says whether a kernel can re-create connections this way. The zero
// value is CannotTell.
type Support uint8

// The three answers.
const (
	CannotTell Support = iota
	No
	Yes
)

func (s Support) String() string {
	switch s {
	case No:
		return "no"
	case Yes:
		return "yes"
	}
	return "cannot tell"
}
