package loadgen

import (
	"fmt"
	"strconv"
)

// The redis serialization protocol, version 2, as raw connections speak it.

func appendBulk(b []byte, s string) []byte {
	b = append(b, '$')
	b = strconv.AppendInt(b, int64(len(s)), 10)
	b = append(b, "\r\n"...)
	b = append(b, s...)
	return append(b, "\r\n"...)
}

// appendCommand appends a command as clients send it.
func appendCommand(b []byte, args []any) []byte {
	b = append(b, '*')
	b = strconv.AppendInt(b, int64(len(args)), 10)
	b = append(b, "\r\n"...)
	for _, a := range args {
		b = appendBulk(b, fmt.Sprint(a))
	}
	return b
}

// appendReply appends the reply that the server must give to o.
func appendReply(b []byte, o op) []byte {
	if o.args[0] == "SET" {
		return fmt.Appendf(b, "+%s\r\n", o.want)
	}
	return appendValue(b, o.want)
}

func appendValue(b []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return append(b, "$-1\r\n"...)
	case string:
		return appendBulk(b, v)
	case int64:
		return fmt.Appendf(b, ":%d\r\n", v)
	case []any:
		b = fmt.Appendf(b, "*%d\r\n", len(v))
		for _, e := range v {
			b = appendValue(b, e)
		}
		return b
	}
	panic(fmt.Sprintf("loadgen: reply of type %T", v))
}
