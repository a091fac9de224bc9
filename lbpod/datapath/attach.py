"""Attaching the programs to an interface, replacing our own in place, and never touching anybody else's.

What this file decides: native or generic XDP (and says why), what counts as ours (a pin with the program's id, see
``pins``), and that a replacement is atomic: netlink's IFLA_XDP_EXPECTED_FD names the program to be replaced, and
a clsact filter is swapped under the same handle and priority. So an agent's restart, upgrade or downgrade loses no
packet. What it leaves to others: loading (``loader``), and the question whether the interface suits us (``features``).

Both work in the network namespace of the calling process. Why not BPF links: they need no expected descriptor, but a
link attaches in the mode in which it was made, tcx links need 6.6, and `ip link` can take a netlink attachment off
where everything else fails. Native and generic cannot be swapped for each other atomically, so a running program's mode
is kept unless the other one is asked for by name.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final, assert_never

from lbpod.datapath import libbpf, netlink
from lbpod.datapath.libbpf import KernelError, XdpFlag
from lbpod.datapath.loader import FastPath
from lbpod.datapath.misses import Miss
from lbpod.datapath.netlink import FilterMessage, Message, Netlink
from lbpod.datapath.pins import PinFolder
from lbpod.datapath.port import DatapathError

TC_HANDLE: Final = 0x4846
"""Our filter's handle in clsact egress ("HF")."""

TC_PRIORITY: Final = 1
"""First in line: a filter before us that ends the walk would leave replies with the pod's address. Ours never ends it:
those behind see every packet (``bpf/reply.h``)."""

_CLSACT_HALVES: Final = (0xFFFF_FFF2, 0xFFFF_FFF3)
"""Ingress and egress, as parents of filters."""

_ASKED_FOR: Final = "asked for"

_NO_FALLBACK: Final = frozenset({errno.EPERM, errno.ENODEV, errno.EBUSY, errno.EEXIST})
"""Refusals of native XDP that generic XDP would meet as well."""

_GONE: Final = frozenset({errno.ENODEV, errno.ENXIO})
"""What the kernel says of an interface that has vanished since it was listed."""


class XdpWish(Enum):
    """What the settings ask for."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"


class XdpMode(Enum):
    """Where the XDP program runs: in the driver, or (slower) after the kernel has made a socket buffer."""

    NATIVE = "native"
    GENERIC = "generic"


@dataclass(frozen=True, slots=True)
class XdpAttachment:
    """How hf_xdp sits on an interface."""

    interface: str
    ifindex: int
    mode: XdpMode
    reason: str
    """Why this mode, for people."""
    replaced: bool
    """True where a program of ours was there before."""

    @property
    def miss(self) -> Miss | None:
        """What the interface lacks, as far as anybody minds: generic XDP that was asked for is no lack."""
        return Miss.NATIVE_XDP if self.mode is XdpMode.GENERIC and self.reason != _ASKED_FOR else None


@dataclass(frozen=True, slots=True)
class TcAttachment:
    """How hf_tc sits on an interface."""

    interface: str
    ifindex: int
    replaced: bool


def interface_index(interface: str) -> int:
    """Index of an interface in this network namespace."""
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:
        raise DatapathError(f"there is no interface {interface!r} in this network namespace") from error


@contextmanager
def _owned(pins: PinFolder, program_id: int, where: str, remedy: str) -> Iterator[int | None]:
    """Descriptor of the program of ours that is attached (None: no program is); DatapathError where it is foreign."""
    if program_id == 0:
        yield None
        return
    fd = pins.program_fd(program_id)
    if fd is None:
        name = libbpf.program_name(program_id)
        known = f"id {program_id}" + (f", {name!r}" if name else "")
        raise DatapathError(f"another program ({known}) sits on {where}: {remedy}, or choose another interface")
    try:
        yield fd
    finally:
        os.close(fd)


def attach_xdp(fast_path: FastPath, interface: str, wish: XdpWish = XdpWish.AUTO) -> XdpAttachment:
    """Attaches hf_xdp, or replaces the one of ours that is there. Raises DatapathError where it cannot."""
    ifindex = interface_index(interface)
    fd = fast_path.program("hf_xdp").fd
    there = libbpf.xdp_query(ifindex)
    remedy = f"detach it (ip link set dev {interface} xdp off)"
    with _owned(fast_path.pins, there.hardware_id, f"{interface} (XDP offload)", remedy):
        pass
    mode = XdpMode.NATIVE if there.native_id else XdpMode.GENERIC
    with _owned(fast_path.pins, there.native_id or there.generic_id, f"{interface} (XDP)", remedy) as old_fd:
        if old_fd is not None and wish in (XdpWish.AUTO, XdpWish(mode.value)):
            libbpf.xdp_attach(ifindex, fd, _flag(mode), old_fd)
            return XdpAttachment(interface, ifindex, mode, "the mode of the program that it replaced", True)
        if old_fd is not None:
            libbpf.xdp_detach(ifindex, _flag(mode), old_fd)
        try:
            chosen, reason = _attach_anew(ifindex, fd, wish)
        except KernelError:
            if old_fd is not None:
                libbpf.xdp_attach(ifindex, old_fd, _flag(mode), None)
            raise
        return XdpAttachment(interface, ifindex, chosen, reason, old_fd is not None)


def _flag(mode: XdpMode) -> XdpFlag:
    return XdpFlag.NATIVE if mode is XdpMode.NATIVE else XdpFlag.GENERIC


def _attach_anew(ifindex: int, fd: int, wish: XdpWish) -> tuple[XdpMode, str]:
    """Attaches where nothing is; the mode and why."""
    match wish:
        case XdpWish.NATIVE | XdpWish.GENERIC:
            mode = XdpMode(wish.value)
            libbpf.xdp_attach(ifindex, fd, _flag(mode), None)
            return mode, _ASKED_FOR
        case XdpWish.AUTO:
            try:
                libbpf.xdp_attach(ifindex, fd, XdpFlag.NATIVE, None)
                return XdpMode.NATIVE, "the driver has it"
            except KernelError as error:
                if error.errno in _NO_FALLBACK:
                    raise
                libbpf.xdp_attach(ifindex, fd, XdpFlag.GENERIC, None)
                return XdpMode.GENERIC, f"native XDP was refused: {error}"
    assert_never(wish)


def attach_tc(fast_path: FastPath, interface: str) -> TcAttachment:
    """Attaches hf_tc at clsact egress, or replaces the one of ours that is there."""
    ifindex = interface_index(interface)
    fd = fast_path.program("hf_tc").fd
    there = libbpf.tc_query(ifindex, TC_HANDLE, TC_PRIORITY)
    remedy = f"delete it (tc filter del dev {interface} egress pref {TC_PRIORITY} handle {TC_HANDLE:#x} bpf)"
    with _owned(fast_path.pins, there, f"{interface} (TC egress, our handle)", remedy) as old_fd:
        libbpf.clsact_create(ifindex)
        libbpf.tc_attach(ifindex, fd, TC_HANDLE, TC_PRIORITY, replace=old_fd is not None)
    return TcAttachment(interface, ifindex, old_fd is not None)


def lost(fast_path: FastPath, ifindex: int) -> tuple[str, ...]:
    """Which of hf_xdp and hf_tc are not on this interface (any more): whoever takes one off tells nobody."""
    there = libbpf.xdp_query(ifindex)
    found = {
        "hf_xdp": (there.native_id, there.generic_id),
        "hf_tc": (libbpf.tc_query(ifindex, TC_HANDLE, TC_PRIORITY),),
    }
    return tuple(name for name, ids in found.items() if fast_path.program(name).id not in ids)


@contextmanager
def _may_vanish() -> Iterator[None]:
    """An interface may vanish between any two questions (a pod's veth, when the pod ends); nothing is attached then."""
    try:
        yield
    except (KernelError, OSError) as error:
        if error.errno not in _GONE:
            raise


def _attached_ids() -> set[int]:
    """Programs on XDP and at our place of TC egress, over all interfaces of this namespace."""
    found: set[int] = set()
    for ifindex, _ in socket.if_nameindex():
        with _may_vanish():
            there = libbpf.xdp_query(ifindex)
            found |= {there.native_id, there.generic_id, there.hardware_id}
            found.add(libbpf.tc_query(ifindex, TC_HANDLE, TC_PRIORITY))
    return found - {0}


def forget_old_programs(fast_path: FastPath) -> int:
    """Unpins programs that have been replaced everywhere, so that the kernel frees them; how many.

    No interface is looked at where all that is pinned is ours: a restart, mostly.
    """
    ours = {program.id for program in fast_path.programs.values()}
    old = [(name, program_id) for name, program_id in fast_path.pins.programs() if program_id not in ours]
    kept = _attached_ids() if old else set()
    gone = [(name, program_id) for name, program_id in old if program_id not in kept]
    for name, program_id in gone:
        fast_path.pins.unpin_program(name, program_id)
    return len(gone)


def forget_old_maps(fast_path: FastPath) -> tuple[str, ...]:
    """Unpins maps that these programs do not have, once they have replaced a later release's; their names.

    Nobody keeps such a map current from now on: the next upgrade must make it anew, not take it for the truth.
    """
    old = [name for name in fast_path.pins.map_names() if name not in fast_path.maps]
    for name in old:
        fast_path.pins.unpin_map(name)
    return tuple(old)


def detach(pins: PinFolder) -> tuple[str, ...]:
    """Takes our programs off every interface of this network namespace; the interfaces that had one.

    clsact goes with our filter where nobody else's is left in it. (Who made it cannot be told, and an empty one serves
    nobody: whoever adds a filter adds it first, as we do.)
    """
    found: set[str] = set()
    for ifindex, interface in socket.if_nameindex():
        with _may_vanish():
            if _detach_xdp(pins, ifindex):
                found.add(interface)
        with _may_vanish():
            if _detach_tc(pins, ifindex):
                found.add(interface)
    return tuple(sorted(found))


def _detach_xdp(pins: PinFolder, ifindex: int) -> bool:
    """True where a program of ours was there."""
    found = False
    there = libbpf.xdp_query(ifindex)
    for mode, program_id in ((XdpFlag.NATIVE, there.native_id), (XdpFlag.GENERIC, there.generic_id)):
        fd = pins.program_fd(program_id)
        if fd is not None:
            try:
                libbpf.xdp_detach(ifindex, mode, fd)
            finally:
                os.close(fd)
            found = True
    return found


def _detach_tc(pins: PinFolder, ifindex: int) -> bool:
    """True where a program of ours was there."""
    fd = pins.program_fd(libbpf.tc_query(ifindex, TC_HANDLE, TC_PRIORITY))
    if fd is None:
        return False
    os.close(fd)
    libbpf.tc_detach(ifindex, TC_HANDLE, TC_PRIORITY)
    if not _filters(ifindex):
        libbpf.clsact_destroy(ifindex)
    return True


def _filters(ifindex: int) -> list[Message]:
    """What is in the two halves of clsact."""
    found: list[Message] = []
    with closing(Netlink()) as kernel:
        for parent in _CLSACT_HALVES:
            question = FilterMessage(ifindex=ifindex, parent=parent)
            found += kernel.dump(netlink.RTM_GETTFILTER, question)
    return found
