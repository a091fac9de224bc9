"""What this machine has, and one plain sentence for each thing that it lacks: what, where, what to do.

Why probe: a verifier's refusal or an errno in the middle of a start tells a newcomer nothing. ``look`` asks the machine
(and changes nothing that stays), ``judge`` turns the facts into findings and does nothing else, so that each sentence
can be tested without a machine that lacks the thing. What this file decides: what we cannot do without (REQUIRED: the
agent says so and stops) and what is only worse without (ADVISED; what is done instead is in ``misses``).
"""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Final

from lbpod.core.limits import UNDERLAY_EXTRA_BYTES
from lbpod.datapath import genetlink, libbpf
from lbpod.datapath.attach import interface_index
from lbpod.datapath.libbpf import F_MMAPABLE, KernelError, MapType, ProgramType
from lbpod.datapath.loader import PIN_FOLDER, kernel_version
from lbpod.datapath.pins import is_bpffs
from lbpod.datapath.port import DatapathError

KERNEL_MIN: Final = (5, 15)
"""The oldest long-term kernel with syscall programs (5.14), per-CPU array batches (5.13), coarse clock (5.11)."""

CLIENT_MTU_DEFAULT: Final = 1_500
_KTIME_GET_COARSE_NS: Final = 160
"""enum bpf_func_id"""

_SIOCGIFMTU: Final = 0x8921


class Capability(IntEnum):
    """linux/capability.h"""

    NET_ADMIN = 12
    SYS_ADMIN = 21
    PERFMON = 38
    BPF = 39


class Feature(Enum):
    """What is looked for, in the order in which the lack of it explains the rest."""

    PRIVILEGES = "privileges"
    KERNEL = "kernel"
    LIBBPF = "libbpf"
    BPF = "bpf"
    BPFFS = "bpffs"
    BTF = "btf"
    MAP_TYPES = "map types"
    PROGRAM_TYPES = "program types"
    COARSE_CLOCK = "coarse clock"
    INTERFACE = "interface"
    NATIVE_XDP = "native xdp"
    CLSACT = "clsact"
    UNDERLAY_MTU = "underlay mtu"


class Need(Enum):
    """How much depends on it."""

    REQUIRED = "required"
    ADVISED = "advised"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is missing."""

    feature: Feature
    need: Need
    sentence: str


@dataclass(frozen=True, slots=True)
class InterfaceFacts:
    """The uplink. None: could not be found out."""

    name: str
    exists: bool
    mtu: int = 0
    native_xdp: bool | None = None
    clsact_error: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What `look` found."""

    capabilities: int
    """Effective ones, a bit each."""
    release: str
    """As uname has it."""
    libbpf_error: str | None
    bpf_error: str | None
    bpffs: bool
    pin_folder: str
    btf: bool
    map_types_missing: tuple[str, ...]
    program_types_missing: tuple[str, ...]
    coarse_clock: bool
    client_mtu: int
    interface: InterfaceFacts | None
    """None: none was named."""


def probe(
    interface: str | None = None, pin_folder: Path = PIN_FOLDER, client_mtu: int = CLIENT_MTU_DEFAULT
) -> tuple[Finding, ...]:
    """What is missing here, in the order in which one lack explains the next. Empty: nothing is."""
    return judge(look(interface, pin_folder, client_mtu))


# --- Looking ----------------------------------------------------------------------------------------------------------


def look(interface: str | None, pin_folder: Path, client_mtu: int) -> Facts:
    """Asks the machine, in the network namespace of the caller."""
    libbpf_error, bpf_error = None, None
    maps: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    coarse = True
    try:
        libbpf.version()
        bpf_error = _bpf_error()
        if bpf_error is None:
            maps = tuple(kind.name.lower() for kind in MapType if not libbpf.has_map_type(kind))
            programs = tuple(kind.name.lower() for kind in ProgramType if not libbpf.has_program_type(kind))
            coarse = libbpf.has_helper(ProgramType.XDP, _KTIME_GET_COARSE_NS)
    except DatapathError as error:
        libbpf_error = str(error)
    return Facts(
        capabilities=_capabilities(),
        release=os.uname().release,
        libbpf_error=libbpf_error,
        bpf_error=bpf_error,
        bpffs=is_bpffs(pin_folder),
        pin_folder=str(pin_folder),
        btf=Path("/sys/kernel/btf/vmlinux").exists(),
        map_types_missing=maps,
        program_types_missing=programs,
        coarse_clock=coarse,
        client_mtu=client_mtu,
        interface=None if interface is None else _look_at(interface, may_change=libbpf_error is None),
    )


def _capabilities() -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _bpf_error() -> str | None:
    """Why not even the simplest of our maps can be made, or None."""
    try:
        os.close(libbpf.map_create(MapType.ARRAY, "probe", 4, 8, 1, F_MMAPABLE))
    except KernelError as error:
        return str(error.__cause__ or error)
    return None


def _look_at(name: str, *, may_change: bool) -> InterfaceFacts:
    try:
        ifindex = interface_index(name)
    except DatapathError:
        return InterfaceFacts(name, exists=False)
    clsact_error = _clsact_error(ifindex) if may_change else None
    return InterfaceFacts(name, True, _mtu(name), genetlink.has_native_xdp(ifindex), clsact_error)


def _mtu(name: str) -> int:
    """MTU of an interface (netdevice(7)); not from /sys, which may show another namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        answer = fcntl.ioctl(sock, _SIOCGIFMTU, struct.pack("16si20x", name.encode(), 0))
        return int(struct.unpack_from("16si", answer)[1])
    return 0


def _clsact_error(ifindex: int) -> str | None:
    """Why clsact cannot be had, or None. One that was not there is removed again."""
    try:
        if libbpf.clsact_create(ifindex):
            libbpf.clsact_destroy(ifindex)
    except KernelError as error:
        return str(error.__cause__ or error)
    return None


# --- Judging ----------------------------------------------------------------------------------------------------------


def judge(facts: Facts) -> tuple[Finding, ...]:
    """One finding for each thing that is missing; pure."""
    return (*_judge_machine(facts), *_judge_kernel(facts), *_judge_interface(facts))


def _has(facts: Facts, *wanted: Capability) -> bool:
    return all(facts.capabilities >> capability & 1 for capability in wanted)


def _judge_machine(facts: Facts) -> Iterator[Finding]:
    """Who we are, and on what."""
    if not _has(facts, Capability.NET_ADMIN) or not (_has(facts, Capability.BPF) or _has(facts, Capability.SYS_ADMIN)):
        yield Finding(
            Feature.PRIVILEGES,
            Need.REQUIRED,
            "This process may not load BPF programs: run it as root, or give it the capabilities BPF and NET_ADMIN.",
        )
    elif not _has(facts, Capability.PERFMON) and not _has(facts, Capability.SYS_ADMIN):
        yield Finding(
            Feature.PRIVILEGES,
            Need.ADVISED,
            "This process lacks the capability PERFMON, so the kernel makes its programs slower: add it.",
        )
    version = kernel_version(facts.release)
    if version is None or version < KERNEL_MIN:
        yield Finding(
            Feature.KERNEL,
            Need.REQUIRED,
            f"This machine runs Linux {facts.release}: {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or newer is needed.",
        )
    if facts.libbpf_error is not None:
        yield Finding(Feature.LIBBPF, Need.REQUIRED, f"libbpf cannot be used ({facts.libbpf_error}).")
    if facts.bpf_error is not None:
        yield Finding(
            Feature.BPF,
            Need.REQUIRED,
            f"The bpf() system call is refused ({facts.bpf_error}): a kernel with CONFIG_BPF_SYSCALL is needed, and in"
            " a container a seccomp profile that allows it.",
        )
    if not facts.bpffs:
        yield Finding(
            Feature.BPFFS,
            Need.REQUIRED,
            f"{facts.pin_folder} is not in a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`.",
        )
    if not facts.btf:
        yield Finding(
            Feature.BTF,
            Need.ADVISED,
            "This kernel does not describe its types (no /sys/kernel/btf/vmlinux, CONFIG_DEBUG_INFO_BTF): forwarding"
            " does not need it, tracing tools do.",
        )


def _judge_kernel(facts: Facts) -> Iterator[Finding]:
    """What can be loaded."""
    if facts.map_types_missing:
        yield Finding(
            Feature.MAP_TYPES,
            Need.REQUIRED,
            f"This kernel lacks the BPF map types {', '.join(facts.map_types_missing)}: use a kernel that has them.",
        )
    if facts.program_types_missing:
        yield Finding(
            Feature.PROGRAM_TYPES,
            Need.REQUIRED,
            f"This kernel lacks the BPF program types {', '.join(facts.program_types_missing)}: use a kernel that has"
            " them.",
        )
    if not facts.coarse_clock:
        yield Finding(
            Feature.COARSE_CLOCK,
            Need.REQUIRED,
            "This kernel has no coarse clock for BPF programs (bpf_ktime_get_coarse_ns, Linux 5.11): use a newer one.",
        )


def _judge_interface(facts: Facts) -> Iterator[Finding]:
    """The uplink, where one was named."""
    uplink = facts.interface
    if uplink is None:
        return
    if not uplink.exists:
        yield Finding(
            Feature.INTERFACE,
            Need.REQUIRED,
            f"There is no interface {uplink.name!r} in this network namespace: name the one that faces the router.",
        )
        return
    if uplink.native_xdp is False:
        yield Finding(
            Feature.NATIVE_XDP,
            Need.ADVISED,
            f"The driver of {uplink.name} has no native XDP: generic XDP is used instead, which is slower.",
        )
    if uplink.clsact_error is not None:
        yield Finding(
            Feature.CLSACT,
            Need.REQUIRED,
            f"The clsact qdisc cannot be added to {uplink.name} ({uplink.clsact_error}): a kernel with"
            " CONFIG_NET_SCH_INGRESS is needed.",
        )
    wanted = facts.client_mtu + UNDERLAY_EXTRA_BYTES
    if uplink.mtu < wanted:
        yield Finding(
            Feature.UNDERLAY_MTU,
            Need.ADVISED,
            f"{uplink.name} has an MTU of {uplink.mtu}: packets of {facts.client_mtu} bytes do not fit into the tunnel"
            f' and are answered with "packet too big"; set it to {wanted} or more.',
        )
