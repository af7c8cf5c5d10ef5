package check

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Numbers of include/uapi/linux/netfilter/nfnetlink_queue.h that x/sys lacks.
const (
	nfqnlMsgConfig  = 2
	nfqaCfgCmd      = 1
	nfqnlCfgCmdBind = 1
)

// bindQueue is the message that binds a queue and asks for an acknowledgement.
func bindQueue(queue uint16) []byte {
	b := make([]byte, 0, 28)
	b = binary.NativeEndian.AppendUint32(b, 28) // struct nlmsghdr
	b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_QUEUE<<8|nfqnlMsgConfig)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0) // struct nfgenmsg
	b = binary.BigEndian.AppendUint16(b, queue)
	b = binary.NativeEndian.AppendUint16(b, 8) // struct nlattr
	b = binary.NativeEndian.AppendUint16(b, nfqaCfgCmd)
	b = append(b, nfqnlCfgCmdBind, 0) // struct nfqnl_msg_config_cmd
	return binary.BigEndian.AppendUint16(b, unix.AF_INET)
}

// ackError reads the kernel's acknowledgement.
func ackError(b []byte) error {
	if len(b) < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("bind queue: the kernel gave no acknowledgement")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); code != 0 {
		return fmt.Errorf("bind queue: %w", syscall.Errno(-code))
	}
	return nil
}
