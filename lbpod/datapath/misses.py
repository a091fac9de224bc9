"""What a kernel may lack and how we do without: one place for every substitute, with its price.

Why: a version check here and a fallback there end as behaviour that nobody can list. What we cannot do without is in
``features`` and stops the agent; what we can is a ``Miss`` here, done another way and reported, so that status and
metrics can name it. Kernel 5.15 is the floor; on a kernel of today nothing of this is used.
"""

import errno
from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np

from lbpod.datapath import libbpf, netlink
from lbpod.datapath.netlink import NeighbourMessage, Netlink
from lbpod.datapath.port import DatapathError


class Miss(Enum):
    """Something that this machine lacks; the value says what is done instead and what it costs."""

    NATIVE_XDP = "the driver has no native XDP: generic XDP is used, some hundred ns a packet more"
    MANAGED_NEIGHBOURS = (
        "this kernel does not look after neighbours by itself (that takes 5.16): they are confirmed by us"
        " every ten seconds, so a changed MAC is noticed that much later"
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
    """Has the kernel resolve a neighbour now and keep it current by itself.

    A kernel without managed entries ignores that attribute and takes the rest: NTF_USE, which resolves or confirms
    once. (A datagram to the discard port would do the same, and reach somebody's host.)
    """
    message = NeighbourMessage(family=_IPV4, ifindex=ifindex, state=_NUD_NONE, flags=_NTF_USE)
    message.put_address(netlink.NDA_DST, address)
    message.put_number(netlink.NDA_FLAGS_EXT, _NTF_EXT_MANAGED)
    _ask(kernel, message, f"keep the neighbour {address}")
    question = NeighbourMessage(family=_IPV4, ifindex=ifindex)
    question.put_address(netlink.NDA_DST, address)
    try:
        entry = kernel.get(netlink.RTM_GETNEIGH, question)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return None  # gone with its interface: an event will say so
        raise DatapathError(f"cannot look at the neighbour {address}: {error.strerror}") from error
    is_managed = (entry.number(netlink.NDA_FLAGS_EXT) or 0) & _NTF_EXT_MANAGED
    return None if is_managed else Miss.MANAGED_NEIGHBOURS


def release_neighbour(kernel: Netlink, ifindex: int, address: str) -> None:
    """Has the kernel treat a neighbour like any other again. One that has gone with its interface is no error."""
    message = NeighbourMessage(family=_IPV4, ifindex=ifindex, state=_NUD_NONE, flags=_NTF_USE)
    message.put_address(netlink.NDA_DST, address)
    _ask(kernel, message, f"release the neighbour {address}")


def _ask(kernel: Netlink, message: NeighbourMessage, what: str) -> None:
    try:
        kernel.do(netlink.RTM_NEWNEIGH, message, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)
    except OSError as error:
        # The interface went away or down meanwhile: an event will say so.
        if error.errno not in (errno.ENODEV, errno.ENETDOWN, errno.EINVAL):
            raise DatapathError(f"cannot {what}: {error.strerror}") from error
