package tcpwrap

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The wire format of nfnetlink_queue (linux/netfilter/nfnetlink_queue.h).
// Netlink headers are in the machine's byte order, values of this subsystem in
// network order.
const (
	nfqSubsys = 3 << 8 // NFNL_SUBSYS_QUEUE

	nfqMsgPacket  = nfqSubsys // message 0
	nfqMsgVerdict = nfqSubsys | 1
	nfqMsgConfig  = nfqSubsys | 2

	nfqCfgCmd    = 1 // NFQA_CFG_CMD
	nfqCfgParams = 2 // NFQA_CFG_PARAMS
	nfqCfgMaxLen = 3 // NFQA_CFG_QUEUE_MAXLEN
	nfqCfgMask   = 4 // NFQA_CFG_MASK
	nfqCfgFlags  = 5 // NFQA_CFG_FLAGS

	nfqCmdBind     = 1 // NFQNL_CFG_CMD_BIND
	nfqCmdPFUnbind = 4 // NFQNL_CFG_CMD_PF_UNBIND: does nothing since Linux 3.8

	nfqCopyPacket = 2

	nfqFlagFailOpen = 1 << 0
	nfqFlagGSO      = 1 << 2

	nfqAttrPacketHdr  = 1  // NFQA_PACKET_HDR: id, protocol, hook
	nfqAttrVerdictHdr = 2  // NFQA_VERDICT_HDR: verdict, id
	nfqAttrPayload    = 10 // NFQA_PAYLOAD
	nfqAttrSKBInfo    = 14 // NFQA_SKB_INFO

	nfqSKBNotVerified = 1 << 2 // NFQA_SKB_CSUM_NOTVERIFIED

	nfHookLocalIn  = 1
	nfHookLocalOut = 3
	nfDrop         = 0
	nfAccept       = 1

	nfqHdrLen     = 20 // netlink header and nfgenmsg
	nfqVerdictLen = nfqHdrLen + 4 + 8
)

func appendNfqHeader(b []byte, typ, flags, queue uint16, bodyLen int) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(nfqHdrLen+bodyLen))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // sequence and port: the kernel fills in
	b = append(b, unix.AF_UNSPEC, 0)      // NFNETLINK_V0
	return binary.BigEndian.AppendUint16(b, queue)
}

func appendAttr(b []byte, typ uint16, data ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func appendConfig(b []byte, queue uint16, attrs []byte) []byte {
	b = appendNfqHeader(b, nfqMsgConfig, unix.NLM_F_REQUEST|unix.NLM_F_ACK, queue, len(attrs))
	return append(b, attrs...)
}

func appendVerdict(b []byte, queue uint16, id PacketID, verdict uint32) []byte {
	b = appendNfqHeader(b, nfqMsgVerdict, unix.NLM_F_REQUEST, queue, nfqVerdictLen-nfqHdrLen)
	b = binary.NativeEndian.AppendUint16(b, 12)
	b = binary.NativeEndian.AppendUint16(b, nfqAttrVerdictHdr)
	b = binary.BigEndian.AppendUint32(b, verdict)
	return binary.BigEndian.AppendUint32(b, uint32(id))
}

// appendRewrite appends the verdict that lets a packet go on as ip, of at most
// MaxRewrite octets.
func appendRewrite(b []byte, queue uint16, id PacketID, ip []byte) []byte {
	padded := (len(ip) + 3) &^ 3
	b = appendNfqHeader(b, nfqMsgVerdict, unix.NLM_F_REQUEST, queue, nfqVerdictLen-nfqHdrLen+4+padded)
	b = binary.NativeEndian.AppendUint16(b, 12)
	b = binary.NativeEndian.AppendUint16(b, nfqAttrVerdictHdr)
	b = binary.BigEndian.AppendUint32(b, nfAccept)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(ip)))
	b = binary.NativeEndian.AppendUint16(b, nfqAttrPayload)
	b = append(b, ip...)
	return append(b, zeros[:padded-len(ip)]...)
}

var zeros [4]byte

// firstMessages is how many octets of b, which is whole netlink messages, are
// those that fit into limit, and one at least.
func firstMessages(b []byte, limit int) int {
	n := 0
	for n < len(b) {
		l := int(binary.NativeEndian.Uint32(b[n:]))
		if n > 0 && n+l > limit {
			break
		}
		n += l
	}
	return n
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// nfqMessage is one netlink message: a packet, or the answer to a request.
type nfqMessage struct {
	packet bool
	errno  unix.Errno // of an answer

	id      PacketID
	hook    uint8
	skbInfo uint32
	payload []byte
}

// nextNfqMessage takes one message off b and returns the rest. It reads with
// bounds checks although the kernel wrote it: a datagram may be truncated.
func nextNfqMessage(b []byte, m *nfqMessage) (rest []byte, err error) {
	*m = nfqMessage{}
	if len(b) < unix.SizeofNlMsghdr {
		return nil, fmt.Errorf("read netlink message: %d octets", len(b))
	}
	n := int(binary.NativeEndian.Uint32(b))
	if n < unix.SizeofNlMsghdr || n > len(b) {
		return nil, fmt.Errorf("read netlink message: length %d of %d", n, len(b))
	}
	rest = b[min((n+3)&^3, len(b)):]
	switch typ := binary.NativeEndian.Uint16(b[4:]); typ {
	case unix.NLMSG_ERROR:
		if n < unix.SizeofNlMsghdr+4 {
			return rest, fmt.Errorf("read netlink answer: %d octets", n)
		}
		m.errno = unix.Errno(-int32(binary.NativeEndian.Uint32(b[16:])))
		return rest, nil
	case nfqMsgPacket:
	default:
		return rest, fmt.Errorf("read netlink message: type %#x", typ)
	}
	m.packet = true
	if n < nfqHdrLen {
		return rest, fmt.Errorf("read queued packet: %d octets", n)
	}
	seen := false
	for a := b[nfqHdrLen:n]; len(a) >= 4; {
		l := int(binary.NativeEndian.Uint16(a))
		if l < 4 || l > len(a) {
			return rest, fmt.Errorf("read queued packet: attribute of %d octets in %d", l, len(a))
		}
		d := a[4:l]
		switch typ := binary.NativeEndian.Uint16(a[2:]) & 0x3fff; {
		case typ == nfqAttrPacketHdr && len(d) >= 7:
			m.id, m.hook, seen = PacketID(binary.BigEndian.Uint32(d)), d[6], true
		case typ == nfqAttrPayload:
			m.payload = d
		case typ == nfqAttrSKBInfo && len(d) >= 4:
			m.skbInfo = binary.BigEndian.Uint32(d)
		}
		a = a[min((l+3)&^3, len(a)):]
	}
	if !seen {
		return rest, fmt.Errorf("read queued packet: no packet header")
	}
	return rest, nil
}
