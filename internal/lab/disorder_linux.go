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

// bpfIngress redirects to the receiving side of a device (linux/bpf.h).
const bpfIngress = 1

// Disorder makes the switch duplicate that percentage of the frames from the
// host, and let as many be overtaken by what arrived with them; 0 ends it. A
// duplicate comes behind what arrived with its original. Loss and Disorder of one
// host end each other.
func (h *Host) Disorder(percent float64) error {
	if percent < 0 || percent > 50 || math.IsNaN(percent) {
		return fmt.Errorf("set disorder of %s: %v percent is not in 0..50", h.name, percent)
	}
	return h.onPort("set disorder of "+h.name, func(n *netlink.Handle, port netlink.Link) error {
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
		prog, err := disorderProgram(percent, port.Attrs().Index)
		if err != nil {
			return err
		}
		defer prog.Close() // the filter holds it
		f := &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: port.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS,
				Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
			},
			Fd: prog.FD(), Name: "disorder", DirectAction: true,
		}
		if err := n.FilterAdd(f); err != nil {
			return fmt.Errorf("add filter: %w", err)
		}
		return nil
	})
}

// disorderProgram puts a frame, or a copy of it, behind all that waits to be
// received, as chance has it. What it puts there comes by here again.
func disorderProgram(percent float64, ifindex int) (*ebpf.Program, error) {
	threshold := int64(math.Round(percent / 100 * (1 << 32)))
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "disorder", Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.FnGetPrandomU32.Call(),
			asm.LoadImm(asm.R1, threshold, asm.DWord),
			asm.JLT.Reg(asm.R0, asm.R1, "overtaken"),
			asm.LoadImm(asm.R1, 2*threshold, asm.DWord),
			asm.JGE.Reg(asm.R0, asm.R1, "pass"),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, int32(ifindex)),
			asm.Mov.Imm(asm.R3, bpfIngress),
			asm.FnCloneRedirect.Call(),
			asm.Mov.Imm(asm.R0, tcActOK).WithSymbol("pass"),
			asm.Return(),
			asm.Mov.Imm(asm.R1, int32(ifindex)).WithSymbol("overtaken"),
			asm.Mov.Imm(asm.R2, bpfIngress),
			asm.FnRedirect.Call(),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("load disorder program: %w", err)
	}
	return p, nil
}
