"""Bodies on the wire: versioned MessagePack, and nothing gets in that breaks a promise of its type.

Why MessagePack and not JSON: bodies are full of addresses and flow bytes, and a snapshot of 65,536 backends is 4 MB
that decode in 30 ms. Why a version byte in front: two releases talk to each other during an upgrade, and "unknown
version 2" is a better sentence than a decoding error.

A body is two MessagePack objects one after the other: the version (a small integer, hence one byte) and the struct as a
map by field names. Fields that a newer sender added are ignored; ``VERSION`` moves when a meaning changes.

Decided here: what is refused, each with one plain sentence (``RemoteError``). Lengths, counts and ranges are checked:
``Keeper`` and ``Planner`` rely on them. The inner invariants of a snapshot are in ``snapshot.check``.
Left to the shells: transport, certificates, roles.
"""

from typing import Final, TypeVar

import msgspec
import numpy as np

from lbpod.core.errors import RemoteError, SnapshotError
from lbpod.core.layout import FLOW, RECORD
from lbpod.core.limits import (
    BACKEND_IDS_MAX,
    BACKENDS_MAX,
    BATCH_MAX,
    BODY_BYTES_MAX,
    GENERATION_MAX,
    HANDOVER_RECORDS_MAX,
    MEMBER_NONE,
    MEMBERS_MAX,
    NAME_BYTES_MAX,
    SLOT_COUNT,
    VIPS_MAX,
)
from lbpod.core.messages import (
    BeatAnswer,
    BeatCall,
    CommitCall,
    ControlCall,
    ForgetAnswer,
    ForgetCall,
    HandoverCall,
    LbStatus,
    MissedAnswer,
    MissedCall,
    PeerAnswer,
    PeerCall,
    PrepareCall,
    QuietAnswer,
    QuietCall,
    ResolveAnswer,
    ResolveCall,
    RingDoneCall,
    RingPrepareCall,
    RingSwitchCall,
    SettleAnswer,
    SettleCall,
    StateAnswer,
    StateCall,
)
from lbpod.core.model import Snapshot
from lbpod.core.snapshot import DIGEST_BYTES, check

VERSION: Final = 1
CONTENT_TYPE: Final = "application/vnd.holdfast+msgpack"

PATH_FAREWELL: Final = "/v1/farewell"
PATH_SNAPSHOT: Final = "/v1/snapshot"
PATH_PREPARE: Final = "/v1/prepare"
PATH_COMMIT: Final = "/v1/commit"
PATH_RESOLVE: Final = "/v1/flows/resolve"
PATH_FORGET: Final = "/v1/flows/forget"
PATH_SETTLE: Final = "/v1/slots/settle"
PATH_QUIET: Final = "/v1/slots/quiet"
PATH_RING_PREPARE: Final = "/v1/ring/prepare"
PATH_RING_HANDOVER: Final = "/v1/ring/handover"
PATH_RING_SWITCH: Final = "/v1/ring/switch"
PATH_RING_DONE: Final = "/v1/ring/done"
PATH_SLOTS_STATE: Final = "/v1/slots/state"
PATH_MISSED: Final = "/v1/flows/missed"
PATH_BEATS: Final = "/v1/beats"
"""A WebSocket (``agent.beats``)."""
PATH_STATE: Final = "/v1/state"
QUERY_SNAPSHOT: Final = "snapshot"
"""``GET /v1/state?snapshot=1``: with the newest snapshot."""

Body = ControlCall | LbStatus | PeerCall | PeerAnswer
T = TypeVar("T", bound=Body)

ROUTES: Final[dict[type[Body], tuple[str, str]]] = {
    Snapshot: ("PUT", PATH_SNAPSHOT),
    PrepareCall: ("POST", PATH_PREPARE),
    CommitCall: ("POST", PATH_COMMIT),
    ResolveCall: ("POST", PATH_RESOLVE),
    ForgetCall: ("POST", PATH_FORGET),
    SettleCall: ("POST", PATH_SETTLE),
    QuietCall: ("POST", PATH_QUIET),
    RingPrepareCall: ("POST", PATH_RING_PREPARE),
    HandoverCall: ("POST", PATH_RING_HANDOVER),
    RingSwitchCall: ("POST", PATH_RING_SWITCH),
    RingDoneCall: ("POST", PATH_RING_DONE),
    StateCall: ("PUT", PATH_SLOTS_STATE),
    MissedCall: ("PUT", PATH_MISSED),
    BeatCall: ("GET", PATH_BEATS),
}
"""Method and path of every call that has a body."""

ANSWERS: Final[dict[type[Body], type[Body]]] = {
    Snapshot: LbStatus,
    PrepareCall: LbStatus,
    CommitCall: LbStatus,
    ResolveCall: ResolveAnswer,
    ForgetCall: ForgetAnswer,
    SettleCall: SettleAnswer,
    QuietCall: QuietAnswer,
    RingPrepareCall: LbStatus,
    HandoverCall: LbStatus,
    RingSwitchCall: LbStatus,
    RingDoneCall: LbStatus,
    StateCall: StateAnswer,
    MissedCall: MissedAnswer,
    BeatCall: BeatAnswer,
}
"""What the answer with status 200 to each call holds."""

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final[dict[type, msgspec.msgpack.Decoder[Body]]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (*ROUTES, *ANSWERS.values())
}


def encode(body: Body) -> bytes:
    """The bytes of a body. Never longer than BODY_BYTES_MAX for what the limits allow."""
    data = bytes([VERSION]) + _ENCODER.encode(body)
    assert len(data) <= BODY_BYTES_MAX, f"a {type(body).__name__} of {len(data)} bytes is larger than any body may be"
    return data


def decode(kind: type[T], data: bytes) -> T:
    """The body of this kind, valid. Raises RemoteError with one sentence where it is not."""
    name = kind.__name__
    if len(data) > BODY_BYTES_MAX:
        raise RemoteError(f"{name}: {len(data)} bytes are more than the {BODY_BYTES_MAX} that a body may have", 413)
    if not data:
        raise RemoteError(f"{name}: the body is empty")
    if data[0] != VERSION:
        raise RemoteError(
            f"{name}: version {data[0]} is unknown here, where {VERSION} is spoken; upgrade the older side"
        )
    try:
        body = _DECODERS[kind].decode(memoryview(data)[1:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteError(f"{name}: malformed: {error}") from error
    assert isinstance(body, kind)
    try:
        _validate(body)
    except SnapshotError as error:
        raise RemoteError(f"{name}: {error}") from error
    return body


def _validate(body: Body) -> None:
    match body:
        case Snapshot():
            check(body)
        case PrepareCall() | CommitCall() | RingPrepareCall() | RingSwitchCall() | RingDoneCall() | HandoverCall():
            _range(body, "generation", body.generation, 1, GENERATION_MAX)
            _digest(body, body.digest)
            if isinstance(body, HandoverCall):
                _range(body, "round", body.round, 1, GENERATION_MAX)
                _members(body, "lost", body.lost)
        case LbStatus():
            _validate_status(body)
        case ResolveCall() | ForgetCall():
            _range(body, "member", body.member, 0, MEMBERS_MAX - 1)
            _flows(body, body.flows)
        case ResolveAnswer():
            count = _backends(body, "backends", body.backends, BATCH_MAX)
            _equal(body, "leases", _items(body, "leases_ms", body.leases_ms, 4, BATCH_MAX), "backends", count)
        case ForgetAnswer():
            _flags(body, "agreed", body.agreed, BATCH_MAX)
        case SettleCall():
            _range(body, "member", body.member, 0, MEMBERS_MAX - 1)
            _range(body, "vip", body.vip, 1, VIPS_MAX - 1)
            _range(body, "epoch", body.epoch, 1, GENERATION_MAX)
            _items(body, "slots", body.slots, 2, SLOT_COUNT)
            _backends(body, "early_backends", body.early_backends, BACKENDS_MAX)
        case SettleAnswer():
            count = _items(body, "slots", body.slots, 2, SLOT_COUNT)
            _equal(body, "slots", count, "bases", _backends(body, "bases", body.bases, SLOT_COUNT))
        case QuietCall():
            _range(body, "vip", body.vip, 1, VIPS_MAX - 1)
            _items(body, "slots", body.slots, 2, SLOT_COUNT)
            _backends(body, "backends", body.backends, BACKENDS_MAX)
        case QuietAnswer():
            _flags(body, "quiet", body.quiet, SLOT_COUNT)
        case StateCall():
            _validate_page(body)
        case StateAnswer():
            _range(body, "taken", body.taken, 0, HANDOVER_RECORDS_MAX)
        case MissedCall():
            _range(body, "member", body.member, 0, MEMBERS_MAX - 1)
            flows = _flows(body, body.flows)
            _equal(body, "flows", flows, "backends", _backends(body, "backends", body.backends, BATCH_MAX))
            _equal(body, "flows", flows, "ages_ms", _items(body, "ages_ms", body.ages_ms, 4, BATCH_MAX))
            _range(body, "full_count", body.full_count, 0, flows)
        case MissedAnswer():
            _range(body, "taken", body.taken, 0, BATCH_MAX)
        case BeatCall() | BeatAnswer():
            _range(body, "member", body.member, 0, MEMBERS_MAX - 1)
            _range(body, "generation", body.generation, 0, GENERATION_MAX)
            _range(body, "ring_epoch", body.ring_epoch, 0, GENERATION_MAX)
            _members(body, "down", body.down)


def _validate_page(page: StateCall) -> None:
    _range(page, "member", page.member, 0, MEMBERS_MAX - 1)
    _range(page, "generation", page.generation, 1, GENERATION_MAX)
    _range(page, "round", page.round, 1, GENERATION_MAX)
    _range(page, "vip", page.vip, 0, VIPS_MAX - 1)
    _items(page, "covered", page.covered, 2, SLOT_COUNT)
    tracking = _items(page, "tracking", page.tracking, 2, SLOT_COUNT)
    _equal(page, "tracking", tracking, "words", _items(page, "words", page.words, 8, SLOT_COUNT))
    if tracking and not page.vip:
        raise RemoteError("StateCall: there are words and no VIP that they belong to")
    _items(page, "steady_vips", page.steady_vips, 4, VIPS_MAX)
    flows = _flows(page, page.flows, HANDOVER_RECORDS_MAX)
    _equal(
        page, "flows", flows, "records", _items(page, "records", page.records, RECORD.itemsize, HANDOVER_RECORDS_MAX)
    )
    _range(page, "full_count", page.full_count, 0, flows)
    slots = np.frombuffer(page.covered, dtype="<u2")
    if (slots[1:] <= slots[:-1]).any():
        raise RemoteError("StateCall: the slots that it covers do not ascend")
    if not np.isin(np.frombuffer(page.tracking, dtype="<u2"), slots).all():
        raise RemoteError("StateCall: it has words of slots that it does not cover")


def _validate_status(status: LbStatus) -> None:
    if not 1 <= len(status.node.encode()) <= NAME_BYTES_MAX:
        raise RemoteError(f"LbStatus: the node has no name, or one longer than {NAME_BYTES_MAX} bytes")
    if status.member != MEMBER_NONE:
        _range(status, "member", status.member, 0, MEMBERS_MAX - 1)
    for field in ("committed", "prepared", "staged"):
        _range(status, field, getattr(status, field), 0, GENERATION_MAX)
    steps = [step for step in (status.committed, status.prepared, status.staged) if step]
    if steps != sorted(steps):
        raise RemoteError(
            "LbStatus: committed <= prepared <= staged does not hold for "
            f"{status.committed}, {status.prepared}, {status.staged}"
        )
    if status.staged:
        _digest(status, status.digest)
    _range(status, "ring_epoch", status.ring_epoch, 0, GENERATION_MAX)
    _range(status, "ring_round", status.ring_round, 0, GENERATION_MAX)
    _members(status, "given_up", status.given_up)
    _range(status, "tracking_slots", status.tracking_slots, 0, SLOT_COUNT * VIPS_MAX)
    for vip, slots in status.tracking:
        _range(status, "tracking (VIP)", vip, 1, VIPS_MAX - 1)
        _range(status, "tracking (slots)", slots, 1, SLOT_COUNT)
    if len({vip for vip, _ in status.tracking}) < len(status.tracking):
        raise RemoteError("LbStatus: tracking names a VIP twice")
    if status.snapshot is not None:
        check(status.snapshot)
        _equal(status, "newest", max(steps, default=0), "generation of the snapshot", status.snapshot.generation)
    if status.in_force is not None:
        check(status.in_force)
        _equal(status, "committed", status.committed, "generation of that in force", status.in_force.generation)


# --- Pieces: each raises RemoteError naming body and field; those that count return the count -------------------------
def _range(body: Body, field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RemoteError(f"{type(body).__name__}: {field} is {value}; it must be from {low} to {high}")


def _equal(body: Body, field: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise RemoteError(f"{type(body).__name__}: {field} ({value}) and {other} ({expected}) do not fit together")


def _digest(body: Body, digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise RemoteError(f"{type(body).__name__}: the digest has {len(digest)} bytes instead of {DIGEST_BYTES}")


def _items(body: Body, field: str, data: bytes, item_bytes: int, count_max: int) -> int:
    count, rest = divmod(len(data), item_bytes)
    if rest:
        raise RemoteError(f"{type(body).__name__}: {field} has {len(data)} bytes, which {item_bytes} does not divide")
    if count > count_max:
        raise RemoteError(f"{type(body).__name__}: {field} has {count} items; the most is {count_max}", 413)
    return count


def _backends(body: Body, field: str, data: bytes, count_max: int) -> int:
    count = _items(body, field, data, 4, count_max)
    ids = np.frombuffer(data, dtype="<u4")
    if count and int(ids.max()) >= BACKEND_IDS_MAX:
        raise RemoteError(
            f"{type(body).__name__}: {field} names backend {int(ids.max())}; ids end at {BACKEND_IDS_MAX - 1}"
        )
    return count


def _flags(body: Body, field: str, data: bytes, count_max: int) -> None:
    _items(body, field, data, 1, count_max)
    if data.translate(None, b"\x00\x01"):
        raise RemoteError(f"{type(body).__name__}: {field} has bytes other than 0 and 1")


def _members(body: Body, field: str, members: tuple[int, ...]) -> None:
    if len(members) > MEMBERS_MAX:
        raise RemoteError(f"{type(body).__name__}: {field} has {len(members)} members; the most is {MEMBERS_MAX}", 413)
    for member in members:
        _range(body, field, member, 0, MEMBERS_MAX - 1)


def _flows(body: Body, data: bytes, count_max: int = BATCH_MAX) -> int:
    count = _items(body, "flows", data, FLOW.itemsize, count_max)
    if count:
        vips = np.frombuffer(data, dtype=FLOW)["vip"]
        if int(vips.min()) < 1 or int(vips.max()) >= VIPS_MAX:
            raise RemoteError(f"{type(body).__name__}: a flow names a VIP that is not from 1 to {VIPS_MAX - 1}")
    return count
