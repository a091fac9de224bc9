"""Which interface is the uplink, and what has to be known of it: index, MAC, MTU and the node's address there.

Asked when the agent starts; name, MTU and MAC are followed from then on (``current``). An interface that is given
another address takes a restart of the agent, which loses no packet.
"""

import errno
import socket
from contextlib import closing
from dataclasses import replace
from typing import Final

from lbpod.core.model import format_address, is_v4, parse_address
from lbpod.datapath.netlink import (
    IFA_ADDRESS,
    IFA_LOCAL,
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_MTU,
    RTA_DST,
    RTA_OIF,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    AddressMessage,
    LinkMessage,
    Netlink,
    RouteMessage,
)
from lbpod.datapath.port import DatapathError
from lbpod.datapath.rows import Uplink

_AF_INET: Final = 2
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8
_MAC_BYTES: Final = 6
_MAIN_TABLE: Final = 254


class UplinkError(Exception):
    """There is no interface that would do. str(): one sentence."""


def find_uplink(interface: str, address: str) -> Uplink:
    """The uplink. interface: its name, empty: the one of the default route; address: the node's, empty: its first one.

    Raises UplinkError.
    """
    try:
        with closing(Netlink()) as kernel:
            index = _index(kernel, interface)
            link = kernel.get(RTM_GETLINK, LinkMessage(index=index))
            name = link.raw(IFLA_IFNAME).rstrip(b"\0").decode()
            mac = link.raw(IFLA_ADDRESS)
            if not link["flags"] & _IFF_UP:
                raise UplinkError(f"the interface {name} is down; set it up first (ip link set {name} up)")
            if len(mac) != _MAC_BYTES or link["flags"] & _IFF_LOOPBACK:
                raise UplinkError(f"the interface {name} has no Ethernet address; choose another one with --interface")
            found = _address(kernel, index, name, address)
            return Uplink(name, index, mac, link.number(IFLA_MTU) or 0, found)
    except (DatapathError, OSError) as error:
        raise UplinkError(f"the kernel does not say what the interfaces are: {error}") from error


def current(uplink: Uplink) -> Uplink | None:
    """The same interface as it is now (name, MTU and MAC may change while it is in use), None where it is gone.

    Raises UplinkError.
    """
    try:
        with closing(Netlink()) as kernel:
            link = kernel.get(RTM_GETLINK, LinkMessage(index=uplink.ifindex))
    except (DatapathError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENODEV:
            return None
        raise UplinkError(f"the kernel does not say what the interface {uplink.name} is: {error}") from error
    name, mac = link.raw(IFLA_IFNAME).rstrip(b"\0").decode(), link.raw(IFLA_ADDRESS)
    mac = mac if len(mac) == _MAC_BYTES else uplink.mac
    return replace(uplink, name=name, mac=mac, mtu=link.number(IFLA_MTU) or 0)


def _index(kernel: Netlink, interface: str) -> int:
    if interface:
        try:
            return socket.if_nametoindex(interface)
        except OSError as error:
            sentence = f"there is no interface {interface!r} here; `ip link` lists those that there are"
            raise UplinkError(sentence) from error
    for route in kernel.dump(RTM_GETROUTE, RouteMessage(family=_AF_INET)):
        index = route.number(RTA_OIF)
        if route["table"] == _MAIN_TABLE and not route.raw(RTA_DST) and index is not None:
            return index
    raise UplinkError("there is no default route to tell the uplink by; name it with --interface")


def _address(kernel: Netlink, index: int, name: str, wanted: str) -> bytes:
    there = kernel.dump(RTM_GETADDR, AddressMessage(family=_AF_INET))
    if wanted:
        try:
            found = parse_address(wanted)
        except ValueError as error:
            raise UplinkError(f"--node-address is {wanted!r}; it must be an IPv4 address") from error
        if not is_v4(found):
            raise UplinkError(f"--node-address is {wanted!r}, which is IPv6; give the node's IPv4 address")
        # On any interface: a node's address may be on a loopback, as it is where routes are announced.
        if not any(each.address(IFA_LOCAL) == format_address(found) for each in there):
            raise UplinkError(
                f"--node-address is {wanted}, which no interface here has; `ip address` lists those it may be"
            )
        return found
    for each in there:
        text = each.address(IFA_LOCAL) or each.address(IFA_ADDRESS)
        if each["index"] == index and text is not None:
            return parse_address(text)
    raise UplinkError(f"the interface {name} has no IPv4 address; give the node's with --node-address")


def describe(uplink: Uplink) -> str:
    """For logs: name, address, MTU."""
    return f"{uplink.name} ({format_address(uplink.address)}, MTU {uplink.mtu})"
