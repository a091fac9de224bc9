"""What a kernel may lack and how we do without: one place for every substitute, with its price.

Why: a version check here and a fallback there end as behaviour that nobody can list. What we cannot do without is in
``features`` and stops the agent; what we can is a ``Miss`` here, done another way and reported, so that status and
metrics can name it. Kernel 5.15 is the floor; on a kernel of today, with room in its tables, nothing of this is used.
"""

import errno
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from typing import Final

import numpy as np

from lbpod.datapath import libbpf, netlink
from lbpod.datapath.netlink import NeighbourMessage, Netlink


class Miss(Enum):
    """Something that this machine lacks; the value says what is done instead and what it costs."""

    NATIVE_XDP = "the driver has no native XDP: generic XDP is used, some hundred ns a packet more"
    MANAGED_NEIGHBOURS = (
        "this kernel does not look after neighbours by itself (that takes 5.16): they are confirmed by us"
        " every ten seconds, so a changed MAC is noticed that much later"
    )
    NEIGHBOUR_REFUSED = (
        "this kernel refuses some neighbours (mostly for want of room, which is net.ipv4.neigh.default.gc_thresh3):"
        " the nodes behind them are not reachable from here, and it is asked again every ten seconds"
    )
    MAP_OF_MAPS_BATCH = (
        "this kernel cannot publish VIPs in batches (that takes 6.0): each new VIP waits for all CPUs by itself"
    )


_ENOTSUPP: Final = 524
"""The kernel's own "not supported", which has no name in user space."""
_IPV4: Final = 2
_NUD_NONE: Final = 0
_NTF_USE: Final = 0x01
_NTF_EXT_MANAGED: Final = 0x01
_GONE: Final = (errno.ENODEV, errno.ENETDOWN, errno.EINVAL, errno.ENOENT)
"""The interface went away or down meanwhile, and its neighbours with it: an event will say so."""


def publish(fd: int, name: str, indices: Sequence[int], inner_fds: Sequence[int]) -> Miss | None:
    """Puts inner maps into an array of maps, in one system call where the kernel can."""
    keys, values = np.array(indices, np.uint32), np.array(inner_fds, np.uint32)
    batch = libbpf.map_update_batch(fd, keys, values)
    if batch.errno == 0:
        return None
    if batch.errno not in (_ENOTSUPP, errno.EOPNOTSUPP, errno.EINVAL):
        error = OSError(batch.errno, "refused")
        raise libbpf.KernelError(batch.errno, f"the map {name} refused new VIPs: errno {batch.errno}") from error
    for index, inner_fd in zip(indices, inner_fds, strict=True):
        libbpf.map_update(fd, name, index.to_bytes(4, "little"), inner_fd.to_bytes(4, "little"))
    return Miss.MAP_OF_MAPS_BATCH


def keep_neighbour(kernel: Netlink, ifindex: int, address: str) -> Miss | None:
    """Has the kernel resolve a neighbour now and keep it current by itself. Raises DatapathError only where the kernel
    does not answer: what it refuses is one neighbour's, and a Miss.

    A kernel without managed entries ignores that attribute and takes the rest: NTF_USE, which resolves or confirms
    once. (A datagram to the discard port would do the same, and reach somebody's host.)
    """
    message = _neighbour(ifindex, address, _NUD_NONE, _NTF_USE)
    message.put_number(netlink.NDA_FLAGS_EXT, _NTF_EXT_MANAGED)
    try:
        kernel.do(netlink.RTM_NEWNEIGH, message, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)
        entry = kernel.get(netlink.RTM_GETNEIGH, _neighbour(ifindex, address))
    except OSError as error:
        return None if error.errno in _GONE else Miss.NEIGHBOUR_REFUSED
    is_managed = (entry.number(netlink.NDA_FLAGS_EXT) or 0) & _NTF_EXT_MANAGED
    return None if is_managed else Miss.MANAGED_NEIGHBOURS


def release_neighbour(kernel: Netlink, ifindex: int, address: str) -> None:
    """Has the kernel treat a neighbour like any other again. One that has gone is no error, and is not made anew; one
    that the kernel keeps all the same costs it a question now and then. Raises DatapathError as `keep_neighbour`."""
    with suppress(OSError):
        kernel.do(netlink.RTM_NEWNEIGH, _neighbour(ifindex, address, _NUD_NONE, _NTF_USE), netlink.NLM_F_REPLACE)


def _neighbour(ifindex: int, address: str, state: int = 0, flags: int = 0) -> NeighbourMessage:
    message = NeighbourMessage(family=_IPV4, ifindex=ifindex, state=state, flags=flags)
    message.put_address(netlink.NDA_DST, address)
    return message
