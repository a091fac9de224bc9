"""What an LB forwards by: which config its generation in force was made from, and who gets new flows in it.

Why the config has editions: generations cannot tell. A change of the ring makes generations that carry the old
backends on, one may be in the making when the config is written, and a backend that is not in force may be so because
it is gone or because it has not come yet. So every config whose backends differ from the last one's has a number,
which travels as the name of the VIP's port (a name is for people: nothing is decided by it) into each snapshot that is
made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lbpod.core.messages import LbStatus
from lbpod.core.model import Snapshot, parse_address
from lbpod.core.snapshot import eligible

_EDITION: Final = "edition-"

Place = tuple[bytes, int]
"""A backend's address and port, as snapshots have them."""


def place_of(address: str, port: int) -> Place:
    return parse_address(address), port


def edition_name(edition: int) -> str:
    """The name of the VIP's port in the config of this edition."""
    return f"{_EDITION}{edition}"


@dataclass(frozen=True)
class InForce:
    """Of one LB. edition: of the config; 0: nothing is in force there."""

    serving: bool
    """It takes part in the ring that is in force: others may relay to it."""
    edition: int = 0
    served: frozenset[Place] = frozenset()
    """Backends that new flows may be sent to."""

    @classmethod
    def of(cls, status: LbStatus) -> InForce:
        """What an LB says of itself, asked with the snapshots."""
        snapshot = _in_force(status)
        if snapshot is None or not snapshot.vips:
            return cls(status.serving)
        (vip,) = snapshot.vips
        _, _, port_name = vip.name.rpartition("/")
        served = frozenset((one.address, one.port) for one in eligible(vip.backends))
        return cls(status.serving, int(port_name.removeprefix(_EDITION)), served)


def _in_force(status: LbStatus) -> Snapshot | None:
    for snapshot in (status.in_force, status.snapshot):
        if snapshot is not None and snapshot.generation == status.committed:
            return snapshot
    return None


def is_out(place: Place, edition: int, everybody: Iterable[InForce]) -> bool:
    """True once no new flow is sent to this backend: everybody forwards by a config of this edition or a later one,
    and by none that serves it. edition: the first that does not."""
    return all(one.edition >= edition and place not in one.served for one in everybody)
