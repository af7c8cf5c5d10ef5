package stream

// AppendRecord appends r's wire form to dst; ErrInvalid when r is out of
// bounds (then dst comes back as it was).
func AppendRecord(dst []byte, r Record) ([]byte, error) { return dst, errNotBuilt }
