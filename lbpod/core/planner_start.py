"""What the nodes' answers tell a Planner that starts: the newest snapshot of all, and what is in force. Functions that
take nothing else into account.

The two differ where a change was under way. Its successor may have to be made from what is in force (a ring change
without somebody who was lost meanwhile), so LBs report both.
"""

from collections.abc import Iterable

from lbpod.core.messages import LbStatus
from lbpod.core.model import Snapshot
from lbpod.core.planner_peers import Aim, Peer, Step, newest_of
from lbpod.core.snapshot import digest_of


def newest_reported(peers: Iterable[Peer]) -> tuple[Aim, bool] | None:
    """The newest snapshot that an LB reports, or any node where there is a ring; and whether others hold another one of
    its generation. Of two of a generation, that which has got furthest: only one can have been committed. One without
    a ring is only good where there is none with a ring: it was made by somebody who did not hear of that."""
    told = [(peer, status) for peer in peers if (status := peer.status) is not None and status.snapshot is not None]
    ringed = [one for one in told if one[1].snapshot is not None and one[1].snapshot.ring.members]
    reported: dict[bytes, tuple[int, Step, Aim]] = {}
    for _, status in ringed or [one for one in told if one[0].is_lb]:
        assert status.snapshot is not None, "who has told something has told a snapshot"
        aim = Aim(status.snapshot, digest_of(status.snapshot))
        step = max(aim.step_of(status), reported.get(aim.digest, (0, Step.NOTHING))[1])
        reported[aim.digest] = (aim.generation, step, aim)
    if not reported:
        return None
    _, _, newest = max(reported.values(), key=lambda one: (one[0], one[1], one[2].digest))
    return newest, sum(generation == newest.generation for generation, _, _ in reported.values()) > 1


def newest_without_ring(peers: Iterable[Peer]) -> int:
    """Generation of the newest snapshot without a ring that a node reports; 0: there is none."""
    told = [peer.status.snapshot for peer in peers if peer.status is not None]
    return max((one.generation for one in told if one is not None and not one.ring.members), default=0)


def in_force_reported(peers: Iterable[Peer]) -> Aim | None:
    """The newest snapshot that an LB has committed; None: none has, or nobody tells what it is."""
    ring = [peer.status for peer in peers if peer.is_lb and peer.status is not None]
    committed = max((status.committed for status in ring), default=0)
    for status in ring:
        found = _committed_by(status)
        if found is not None and found.generation == committed:
            return Aim(found, digest_of(found))
    return None


def _committed_by(status: LbStatus) -> Snapshot | None:
    newest = status.snapshot
    return newest if newest is not None and newest.generation == status.committed else status.in_force


def newest_host(peers: Iterable[Peer], written: int) -> Snapshot | Peer | None:
    """The newest snapshot that a host agent knows, where it is not older than that which is written down (written: its
    generation); a Peer: it has to be asked for it. At most one is, that with the highest generation."""
    heard = [(newest_of(peer.status), peer.name, peer) for peer in peers if not peer.is_lb and peer.status is not None]
    newest, _, top = max(heard, key=lambda one: one[:2], default=(0, "", None))
    if top is None or top.status is None or newest < max(written, 1):
        return None
    return top.status.snapshot or top
