"""Which slot a flow has, and how slots and backends (or LBs) find each other: every hash of Holdfast.

Why one file: two programs (this one and ``lbpod/bpf/hash.h``) and every LB have to come to the same numbers, bit for
bit. What both languages compute is pinned by ``tests/vectors/murmur3.json``; what only Python computes is pinned by
integer arithmetic alone (``uint32`` with wrap-around; no float, never Python's ``hash()``).

Two families live here:

- **The flow hash**: murmur3-32 (Austin Appleby, public domain; here the ``mmh3`` package and a NumPy twin for arrays)
  over the tuple as it lies in the packet, with the cluster's seed. ``slot = hash >> 16``: the *top* bits, so that
  the low bits stay free for the outer source port, which then does not repeat what the slot already says.
- **The pair cost**: one 32-bit number for (slot, identity), where an identity is a backend or an LB. Rendezvous hashing
  takes the lowest cost (the highest score). The identity is first hashed with blake2b to two words, so that what varies
  in it (mostly the last octet of an address) cannot show; the pair itself needs only six integer operations more,
  because a table of 1,000 backends takes 65 million of them. For a fixed identity the cost is a *bijection* of the
  slot's word, so no two slots ever cost one identity the same: the table's order has no ties on that side.

Dropped: hashing the pair with murmur3 itself (twice the operations for nothing that a test could see), and one word
per identity (two of 65,536 backends would share it as often as not, and then be twins in every slot).

Left to others: what is done with the numbers (``table.py``, ``ownership.py``).
"""

import hashlib
from typing import Final

import mmh3
import numpy as np
import numpy.typing as npt

from lbpod.core.limits import SLOT_COUNT
from lbpod.core.model import is_v4, parse_address

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

ADDRESS_BYTES: Final = 16
SLOT_SHIFT: Final = 32 - (SLOT_COUNT.bit_length() - 1)
"""What is left of a flow's hash is its slot: 16 for the fast path's 2^16 slots."""

MAPPED_PREFIX: Final = parse_address("0.0.0.0")[:12]
"""First 12 bytes of an IPv4 address in its 16-byte form (RFC 4291, 2.5.5.2)."""

_C1: Final = np.uint32(0xCC9E2D51)
_C2: Final = np.uint32(0x1B873593)
_GOLDEN: Final = np.uint32(0x9E3779B1)


def flow_tuple(src: bytes, dst: bytes, sport: int, dport: int, proto: int) -> bytes:
    """Give the bytes that are hashed: 16 where both addresses are IPv4, otherwise 40.

    Addresses in network order (4 bytes each, or 16), source port, destination port (network order), and the protocol as
    one little-endian 32-bit word. The layout is shared with ``lbpod/bpf/hash.h``. Ports are host integers, 0..65535.
    """
    assert len(src) == ADDRESS_BYTES and len(dst) == ADDRESS_BYTES, "addresses are 16 bytes outside the packet"
    if is_v4(src) and is_v4(dst):
        src, dst = src[12:], dst[12:]
    return src + dst + sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + proto.to_bytes(4, "little")


def flow_hash(src: bytes, dst: bytes, sport: int, dport: int, proto: int, seed: int) -> int:
    """Hash one flow: 0..2^32-1. With ``ClientIP`` affinity the caller passes source port 0. ``seed`` is 32 bits."""
    return mmh3.hash(flow_tuple(src, dst, sport, dport, proto), seed, signed=False)


def slot_of(h: int) -> int:
    """Slot of a flow hash: its top bits."""
    return h >> SLOT_SHIFT


def flow_hashes(
    addresses: U8,
    sports: U16,
    vip_address: bytes,
    vip_port: int,
    proto: int,
    client_ip_affinity: bool,
    seed: int,
) -> U32:
    """Hash ``n`` client flows of one VIP at once; equal to ``flow_hash`` for each, bit for bit.

    ``addresses``: (n, 16) uint8. ``sports``: (n,) uint16 host integers (ignored with affinity). Returns (n,) uint32.
    """
    count = len(addresses)
    assert addresses.shape == (count, ADDRESS_BYTES) and sports.shape == (count,), "one address and port per flow"
    addresses = np.ascontiguousarray(addresses)
    ports = np.empty((count, 2), dtype=">u2")
    ports[:, 0] = 0 if client_ip_affinity else sports
    ports[:, 1] = vip_port
    port_words = ports.view("<u4").astype(np.uint32)
    proto_words = np.full((count, 1), proto, dtype=np.uint32)
    address_words = addresses.view("<u4").astype(np.uint32)
    vip_words = np.broadcast_to(np.frombuffer(vip_address, dtype="<u4").astype(np.uint32), (count, 4))
    if not is_v4(vip_address):
        return murmur3_words(np.hstack((address_words, vip_words, port_words, proto_words)), seed)
    short = np.hstack((address_words[:, 3:], vip_words[:, 3:], port_words, proto_words))
    hashes = murmur3_words(short, seed)
    foreign = np.flatnonzero((addresses[:, :12] != np.frombuffer(MAPPED_PREFIX, dtype=np.uint8)).any(axis=1))
    if len(foreign):
        long = np.hstack((address_words, vip_words, port_words, proto_words))[foreign]
        hashes[foreign] = murmur3_words(long, seed)
    return hashes


def murmur3_words(words: U32, seed: int) -> U32:
    """murmur3-32 of ``n`` messages of ``w`` little-endian words each: (n, w) uint32 in, (n,) uint32 out."""
    h = np.full(len(words), seed, dtype=np.uint32)
    for column in range(words.shape[1]):
        k = words[:, column] * _C1
        k = (k << np.uint32(15)) | (k >> np.uint32(17))
        h ^= k * _C2
        h = (h << np.uint32(13)) | (h >> np.uint32(19))
        h = h * np.uint32(5) + np.uint32(0xE6546B64)
    h ^= np.uint32(4 * words.shape[1])
    return _mix_in_place(h)


def _mix_in_place(h: U32) -> U32:
    """murmur3's finaliser (a bijection of 32 bits), in place: memory traffic is what a table build waits for."""
    t = np.empty_like(h)
    np.right_shift(h, np.uint32(16), out=t)
    np.bitwise_xor(h, t, out=h)
    np.multiply(h, np.uint32(0x85EBCA6B), out=h)
    np.right_shift(h, np.uint32(13), out=t)
    np.bitwise_xor(h, t, out=h)
    np.multiply(h, np.uint32(0xC2B2AE35), out=h)
    np.right_shift(h, np.uint32(16), out=t)
    np.bitwise_xor(h, t, out=h)
    return h


SLOT_WORDS: Final[U32] = _mix_in_place(np.arange(1, SLOT_COUNT + 1, dtype=np.uint32) * _GOLDEN)
"""One word per slot, all different: (SLOT_COUNT,) uint32, read-only."""
SLOT_WORDS.setflags(write=False)


def identity_words(identity: bytes, seed: int, domain: bytes) -> tuple[int, int]:
    """Two 32-bit words that stand for a backend or an LB in ``pair_costs``; the second is odd.

    ``domain`` (at most 16 bytes) keeps uses apart: an LB and a backend at one address must not agree about slots.
    """
    digest = hashlib.blake2b(identity, digest_size=8, key=seed.to_bytes(4, "little"), person=domain).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little") | 1


def pair_costs(slot_words: U32, identities: U32) -> U32:
    """Cost of every (slot, identity), uniform over 32 bits: (n,) and (m, 2) uint32 in, (n, m) uint32 out.

    cost = fmix32((slot_word ^ first) * second). The lowest cost of a slot is its highest rendezvous score.
    """
    return _mix_in_place((slot_words[:, None] ^ identities[None, :, 0]) * identities[None, :, 1])
