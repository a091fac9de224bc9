"""Which interface is the uplink, and what has to be known of it: index, MAC, MTU and the node's address there.

Asked once, when the agent starts, before there is an event loop (pyroute2's synchronous calls run one of their own). An
interface that is renamed, or given another address, takes a restart of the agent, which loses no packet.
"""

from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from lbpod.core.model import format_address, is_v4, parse_address
from lbpod.datapath.rows import Uplink

_AF_INET: Final = 2
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8
_MAC_BYTES: Final = 6


class UplinkError(Exception):
    """There is no interface that would do. str(): one sentence."""


def find_uplink(interface: str, address: str) -> Uplink:
    """The uplink. interface: its name, empty: the one of the default route; address: the node's, empty: its first one.

    Raises UplinkError.
    """
    try:
        with IPRoute() as ip:
            index = _index(ip, interface)
            link = ip.get_links(index)[0]
            name = str(link.get_attr("IFLA_IFNAME"))
            mac = bytes.fromhex(str(link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
            if not link["flags"] & _IFF_UP:
                raise UplinkError(f"the interface {name} is down; set it up first (ip link set {name} up)")
            if len(mac) != _MAC_BYTES or link["flags"] & _IFF_LOOPBACK:
                raise UplinkError(f"the interface {name} has no Ethernet address; choose another one with --interface")
            found = _address(ip, index, name, address)
            return Uplink(name, index, mac, int(link.get_attr("IFLA_MTU")), found)
    except (NetlinkError, OSError) as error:
        raise UplinkError(f"the kernel does not say what the interfaces are: {error}") from error


def _index(ip: Any, interface: str) -> int:
    if interface:
        found = ip.link_lookup(ifname=interface)
        if not found:
            raise UplinkError(f"there is no interface {interface!r} here; `ip link` lists those that there are")
        return int(found[0])
    for route in ip.get_default_routes(family=_AF_INET):
        index = route.get_attr("RTA_OIF")
        if index is not None:
            return int(index)
    raise UplinkError("there is no default route to tell the uplink by; name it with --interface")


def _address(ip: Any, index: int, name: str, wanted: str) -> bytes:
    if wanted:
        try:
            found = parse_address(wanted)
        except ValueError as error:
            raise UplinkError(f"--node-address is {wanted!r}; it must be an IPv4 address") from error
        if not is_v4(found):
            raise UplinkError(f"--node-address is {wanted!r}, which is IPv6; give the node's IPv4 address")
        # On any interface: a node's address may be on a loopback, as it is where routes are announced.
        if not any(each.get_attr("IFA_LOCAL") == format_address(found) for each in ip.get_addr(family=_AF_INET)):
            raise UplinkError(
                f"--node-address is {wanted}, which no interface here has; `ip address` lists those it may be"
            )
        return found
    for each in ip.get_addr(family=_AF_INET, index=index):
        text = each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS")
        if text is not None:
            return parse_address(str(text))
    raise UplinkError(f"the interface {name} has no IPv4 address; give the node's with --node-address")


def describe(uplink: Uplink) -> str:
    """For logs: name, address, MTU."""
    return f"{uplink.name} ({format_address(uplink.address)}, MTU {uplink.mtu})"
