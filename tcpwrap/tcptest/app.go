package tcptest

// Bye is what an App says when its client has said all.
const Bye = "bye!"

// App is a server's side of one conversation: what it says is a function of what
// it has heard on that connection, and of nothing else.
type App struct {
	Name  int // apps of different names say different things
	Heard int
	Done  bool // it has said Bye
}

// Hears answers what the app says to p.
func (a *App) Hears(p []byte) []byte { return a.AppendHears(nil, p) }

// AppendHears is Hears, appended to dst.
func (a *App) AppendHears(dst, p []byte) []byte {
	for _, b := range p {
		a.Heard++
		if b%3 == 0 {
			for k := range 1 + int(b)%9 {
				dst = append(dst, b^byte(a.Heard)^byte(k*11)^byte(a.Name*29))
			}
		}
	}
	return dst
}

// Says fills p with what client name says from its octet number from on.
func Says(p []byte, name, from int) {
	for i := range p {
		p[i] = byte(from+i)*7 ^ byte(name*41)
	}
}
