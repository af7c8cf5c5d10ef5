package lab

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Verdicts of a direct-action classifier (linux/pkt_cls.h).
const (
	tcActOK   = 0
	tcActShot = 2
)

// Loss makes the switch lose that percentage of the frames to and from the
// host, each by its own throw of the dice; 0 ends it. A frame on a veth may be
// a super-segment of up to 64 KB, so more bytes go at once than on a wire.
// (There is no netem on the kernels this runs on, and a rule on the host itself
// would stand among the rules under test.)
func (h *Host) Loss(percent float64) error {
	if percent < 0 || percent > 100 || math.IsNaN(percent) {
		return fmt.Errorf("set loss of %s: %v percent is not in 0..100", h.name, percent)
	}
	return h.onPort("set loss of "+h.name, func(n *netlink.Handle, port netlink.Link) error {
		attrs := netlink.QdiscAttrs{LinkIndex: port.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}
		clsact := &netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "clsact"}
		if err := n.QdiscDel(clsact); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("remove classifier: %w", err)
		}
		if percent == 0 {
			return nil
		}
		if err := n.QdiscAdd(clsact); err != nil {
			return fmt.Errorf("add classifier: %w", err)
		}
		prog, err := diceProgram(percent)
		if err != nil {
			return err
		}
		defer prog.Close() // the filters hold it
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			f := &netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{
					LinkIndex: port.Attrs().Index, Parent: parent,
					Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
				},
				Fd: prog.FD(), Name: "loss", DirectAction: true,
			}
			if err := n.FilterAdd(f); err != nil {
				return fmt.Errorf("add filter: %w", err)
			}
		}
		return nil
	})
}

// diceProgram drops a packet when a random number is below the threshold.
func diceProgram(percent float64) (*ebpf.Program, error) {
	threshold := uint64(math.Round(percent / 100 * (1 << 32)))
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "loss", Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.FnGetPrandomU32.Call(),
			asm.LoadImm(asm.R1, int64(threshold), asm.DWord),
			asm.Mov.Reg(asm.R2, asm.R0),
			asm.Mov.Imm(asm.R0, tcActShot),
			asm.JLT.Reg(asm.R2, asm.R1, "exit"),
			asm.Mov.Imm(asm.R0, tcActOK),
			asm.Return().WithSymbol("exit"),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("load loss program: %w", err)
	}
	return p, nil
}
