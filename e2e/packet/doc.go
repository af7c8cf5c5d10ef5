// Package packet is a test bench on the level of segments, in the manner of
// packetdrill and gVisor's packetimpact: scripts say what a client puts on the
// wire and what it must see there, also across a generation and a takeover. The
// client is no kernel's TCP but a script, so it can be in any state, right or
// wrong, and hide nothing.
//
// # The language
//
// One step a line; # begins a comment. Sequence numbers are relative: the
// client's SYN is 0 and its first octet 1, and so are the server's.
//
//	conn B               go on with connection B (the first is A); each has a port of its own
//	renew                the same port, with nothing known: the next SYN is another connection's, with a later ISN
//	open [<OPTIONS>]     the three segments of a handshake
//	< FLAGS ...          send one segment
//	<< FLAGS ...         the same, and again every 200 ms until it is acknowledged
//	> FLAGS ...          see one segment
//	recv "TEXT"          see these octets next, in segments of any size, acknowledging them
//	recv N               the same for N octets of the server's pattern (W N)
//	gather N             see N octets of the pattern more, and acknowledge nothing
//	icmp KIND            see an ICMP message about this connection: port-unreachable, host-unreachable, too-big
//	silence 300ms        see nothing whatever for so long
//	sleep 300ms          let time pass
//	checkpoint           a generation is taken and stable on the standby
//	takeover             the server, or its host, dies; the script goes on at once
//	live                 the standby has taken over
//
// A segment is
//
//	FLAGS [SEQ:END[(LEN)]] [ack N] [win N] [urg N] [<OPTIONS>] ["TEXT"] [within 300ms]
//
// FLAGS are of "SFRPU." as in packetdrill; P is not compared. urg is the urgent
// pointer of a segment to be sent, with U. END does not count
// SYN and FIN. What is left out is, of a segment to be sent: the next sequence
// number, the acknowledgement of all that came in order, the window sent last
// (65535), timestamps when the connection has them; octets without a text are
// the pattern's. Of a segment to be seen what is left out is not compared.
// OPTIONS are of mss N, sackOK, wscale N, ts, ts VAL, ts VAL ECR, nop, sack L:R...,
// separated by commas; "<>" is none at all. In what is seen, those named must be
// there, and "no ts", "no sackOK", "no wscale" must not.
//
// To see a segment means that it comes next but for what says nothing new: pure
// acknowledgements and repetitions are passed over. Anything else that comes
// first ends the script: a reset, an ICMP message, data, a FIN. So does what is
// left over at its end.
//
// Whatever a script says, it fails when the server's side breaks TCP: an octet
// sent twice with two values, data beyond a FIN or beyond the offered window, an
// acknowledgement of what was never sent, a timestamp that goes back.
//
// # The server
//
// e2e/packet/server does what the client's octets say, a line a command, and
// nothing else, so that its replay is exact:
//
//	E text     answer text and a line end
//	W n        answer n octets of the pattern
//	D n        take the next n octets and answer "n SUM": see Sum
//	F          shut its side down for writing
//	C          close
//	L          close with SO_LINGER 0: a reset
//	K n        at the client's FIN do not close but write n octets of the pattern first
//	S n        the same, and hold before closing
//	H          hold: read no more until another connection says X for this port
//	X name     let the connection of that name (a letter, of the same script) go on
//	Q name     answer what became of the connection of that name, "open eof closed"
//
// Scripts run in parallel in one world: they share the generation and the
// takeover, and nothing else.
package packet
