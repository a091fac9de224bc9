"""What lies in the maps, as NumPy dtypes: Python's half of ``lbpod/bpf/types.h``.

Why in core: the oracle and the Keeper speak of flows, records and slots in the very shape in which the kernel keeps
them, so that no decision has to loop over flows in Python. ``lbpod/datapath/layout.py`` proves these dtypes against the
BTF of the compiled programs. Addresses are 16 bytes (IPv4 as ``::ffff:a.b.c.d``); ``*_be`` fields are in network order.
"""

from typing import Final

import numpy as np

from lbpod.core.limits import VIPS_MAX

VIP: Final = np.dtype(
    [
        ("addr", "u1", (16,)),
        ("port_be", ">u2"),
        ("protocol", "u1"),
        ("flags", "u1"),
        ("id", "<u4"),
        ("next", "<u4"),
        ("used", "<u4"),
    ]
)
BACKEND: Final = np.dtype(
    [
        ("addr", "u1", (16,)),
        ("port_be", ">u2"),
        ("flags", "u1"),
        ("pad", "u1"),
        ("node", "<u4"),
        ("vip", "<u4"),
        ("pad2", "<u4"),
    ]
)
NODE: Final = np.dtype(
    [
        ("addr", "u1", (16,)),
        ("dst_mac", "u1", (6,)),
        ("src_mac", "u1", (6,)),
        ("ifindex", "<u4"),
        ("csum", "<u4"),
        ("mtu", "<u2"),
        ("flags", "<u2"),
        ("pad", "<u4", (2,)),
    ]
)
MEMBER: Final = np.dtype([("addr", "u1", (16,)), ("node", "<u4"), ("flags", "<u4")])
FLOW: Final = np.dtype([("addr", "u1", (16,)), ("port_be", ">u2"), ("pad", "<u2"), ("vip", "<u4")])
RECORD: Final = np.dtype([("backend", "<u4"), ("round", "<u4"), ("seen_ns", "<u8")])
LEASE: Final = np.dtype([("backend", "<u4"), ("round", "<u4"), ("until_ns", "<u8")])
PENDING: Final = np.dtype([("slot", "<u4"), ("pad", "<u4"), ("seen_ns", "<u8")])
NAT_KEY: Final = np.dtype(
    [
        ("client", "u1", (16,)),
        ("pod", "u1", (16,)),
        ("client_port_be", ">u2"),
        ("pod_port_be", ">u2"),
        ("protocol", "u1"),
        ("pad", "u1", (3,)),
    ]
)
NAT: Final = np.dtype(
    [
        ("vip", "u1", (16,)),
        ("vip_port_be", ">u2"),
        ("flags", "u1"),
        ("pad", "u1"),
        ("pad2", "<u4"),
        ("seen_ns", "<u8"),
    ]
)
CONFIG: Final = np.dtype(
    [
        ("node_addr", "u1", (16,)),
        ("mac", "u1", (6,)),
        ("self", "<u2"),
        ("vni", "<u4"),
        ("seed", "<u4"),
        ("epoch", "<u4"),
        ("ifindex", "<u4"),
        ("ring_change", "<u2"),
        ("mss_max", "<u2"),
        ("version", "<u4"),
    ]
)
COUNTER: Final = np.dtype([("packets", "<u8"), ("bytes", "<u8")])
VIP_STAT: Final = np.dtype([("unrecorded_ns", "<u8"), ("pad", "<u8")])

LAYOUT_VERSION: Final = 4
"""Version of all of the above; written to ``config.version``, checked when pinned maps are taken over. (4: records
count below their round. A program of 3 would take those for void.)"""

# --- Bits -------------------------------------------------------------------------------------------------------------
SLOT_CURRENT_MASK: Final = 0x00FF_FFFF
SLOT_TRACKING: Final = 0x0100_0000
SLOT_SETTLING: Final = 0x0200_0000
SLOT_ROUND_MASK: Final = 0xFC00_0000
SLOT_ROUND_ONE: Final = 0x0400_0000
SLOT_BASE_SHIFT: Final = 32
SLOT_AGREED: Final = 1 << 63
"""A slot is one uint64: ``current | flags | round | base << 32``; 0 means 'no backend'. The round counts, modulo 64,
how often this LB has begun to track the slot: records and leases of another round are void. AGREED lies above base, and
where it is set, so are records of other backends than current."""

VIP_CLIENT_IP: Final = 0x01
BACKEND_ALIVE: Final = 0x01
BACKEND_LOCAL: Final = 0x02
NODE_REACHABLE: Final = 0x01
MEMBER_PRESENT: Final = 0x01
MEMBER_UP: Final = 0x02
MEMBER_DOUBTED: Final = 0x04
NAT_FIN_IN: Final = 0x01
NAT_FIN_OUT: Final = 0x02
NAT_RST: Final = 0x04
NAT_SYN: Final = 0x08
NAT_ANSWERED: Final = 0x10
NAT_ASSURED: Final = 0x20
"""The last three in `unassured` alone: began with a SYN, and the client has sent nothing else since; the pod has
answered; is in `nat` by now."""
RECORD_MISSING: Final = 0xFFFF_FFFF
"""``round`` of a looked-up record that does not exist. Of one that does, what lies below SLOT_ROUND_MASK counts the
packets of a flow without a first one that have travelled the chain again (CHAIN_AGAIN_MAX)."""
RECORD_EMBRYONIC: Final = 0x0100_0000
"""In the ``round`` of a looked-up record that was found in `embryonic`; never in a map."""

PROTOCOL_ICMP: Final = 1
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17

_VIP_SHIFT: Final = 32 - (VIPS_MAX.bit_length() - 1)


def vip_index(addr: bytes, port: int, protocol: int) -> int:
    """Index of a VIP in the direct-mapped part of ``vips``: the same arithmetic as ``hf_vip_index`` in the C program.

    addr: 16 bytes; port in host order. Only the last four bytes of the address take part (multiplicative hashing,
    Knuth, The Art of Computer Programming, vol. 3, sec. 6.4). Result: 0 .. VIPS_MAX-1.
    """
    word = int.from_bytes(addr[12:16], "big")
    mixed = (word ^ (port << 16 | port) ^ protocol * 0x0101) & 0xFFFF_FFFF
    return (mixed * 0x9E37_79B1 & 0xFFFF_FFFF) >> _VIP_SHIFT


for _name, _size in (
    (VIP, 32), (BACKEND, 32), (NODE, 48), (MEMBER, 24), (FLOW, 24), (RECORD, 16), (LEASE, 16), (PENDING, 16),
    (NAT_KEY, 40), (NAT, 32), (CONFIG, 48), (COUNTER, 16), (VIP_STAT, 16),
):  # fmt: skip
    assert _name.itemsize == _size, "a dtype must have the size of its struct in lbpod/bpf/types.h"
