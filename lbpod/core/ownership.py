"""Who is asked about a slot: its owner and its backup among the LBs of the ring.

Plain rendezvous hashing, not the bounded table of ``table.py``: an LB owns slots only while they are tracking, so the
few per cent by which plain rendezvous is out of balance cost nothing, whereas a bound would make the loss of one LB
move slots between two others, and each such slot costs a handover. Here the loss of a member moves the slots that
it owned or backed, and no other one. Weights were dropped for the same reason.

The score comes from the member's *address*, not from its id: ids are given out again, and a node that leaves and comes
back should get its old slots.

Left to others: when ``own``, ``next`` and ``prev`` change (DESIGN: section 4), and who is believed to be up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lbpod.core.hashing import ADDRESS_BYTES, SLOT_WORDS, U16, U32, identity_words, pair_costs
from lbpod.core.limits import MEMBER_NONE, MEMBERS_MAX, REPLICAS_MAX, SLOT_COUNT

_DOMAIN = b"hf-ring"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """An LB of the ring."""

    id: int
    """0 <= id < MEMBERS_MAX: what the ownership arrays hold."""
    address: bytes
    """16-byte address of its node: what its score is made of."""


def ownership(members: Sequence[Member], seed: int) -> U32:
    """Give owner and backup of every slot: (SLOT_COUNT,) uint32, read-only, independent of the order of ``members``.

    Owner (highest score) in the low 16 bits, backup (second highest) in the high 16 bits, MEMBER_NONE where there is
    none. Where two scores are equal, the lower address wins. ``seed`` is the cluster's, 32 bits.
    """
    ring = sorted(members, key=lambda member: member.address)
    _check(ring)
    best = np.full(SLOT_COUNT, MEMBER_NONE, dtype=np.uint32)
    second = best.copy()
    best_cost = np.full(SLOT_COUNT, 1 << 32, dtype=np.uint64)
    second_cost = best_cost.copy()
    for member in ring:
        words = np.array([identity_words(member.address, seed, _DOMAIN)], dtype=np.uint32)
        cost = pair_costs(SLOT_WORDS, words)[:, 0].astype(np.uint64)
        wins = cost < best_cost
        places = ~wins & (cost < second_cost)
        second[wins], second_cost[wins] = best[wins], best_cost[wins]
        best[wins], best_cost[wins] = member.id, cost[wins]
        second[places], second_cost[places] = member.id, cost[places]
    own = best | (second << np.uint32(16))
    own.setflags(write=False)
    return own


def _check(ring: Sequence[Member]) -> None:
    assert len(ring) <= MEMBERS_MAX, f"a ring has at most {MEMBERS_MAX} members"
    assert all(0 <= member.id < MEMBERS_MAX for member in ring), f"member ids are below {MEMBERS_MAX}"
    assert all(len(member.address) == ADDRESS_BYTES for member in ring), "a member's address is 16 bytes"
    assert len({member.id for member in ring}) == len(ring), "two members share an id"
    assert len({member.address for member in ring}) == len(ring), "two members share an address"


def owners(own: U32) -> U16:
    """Give the owner's id of every slot: (n,) uint16."""
    return (own & np.uint32(0xFFFF)).astype(np.uint16)


def backups(own: U32) -> U16:
    """Give the backup's id of every slot: (n,) uint16."""
    return (own >> np.uint32(16)).astype(np.uint16)


def replicas(own: U32, next_: U32 | None = None, prev: U32 | None = None) -> U16:
    """List the replicas of every slot: (n, REPLICAS_MAX) uint16, each id once, MEMBER_NONE after the last.

    Order: own.owner, own.backup, next.owner, next.backup, prev.owner, prev.backup: the order of the chain.
    ``next_`` and ``prev`` are None outside a ring change.
    """
    count = len(own)
    listed = np.full((count, REPLICAS_MAX), MEMBER_NONE, dtype=np.uint16)
    for column, array in ((0, own), (2, next_), (4, prev)):
        if array is not None:
            assert len(array) == count, "ownership arrays differ in length"
            listed[:, column], listed[:, column + 1] = owners(array), backups(array)
    for column in range(1, REPLICAS_MAX):
        again = (listed[:, :column] == listed[:, column, None]).any(axis=1)
        listed[again, column] = MEMBER_NONE
    packed = np.argsort(listed == MEMBER_NONE, axis=1, kind="stable")
    return np.take_along_axis(listed, packed, axis=1)
