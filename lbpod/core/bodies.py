"""Bodies on the wire: what controller, LBs and host agents say to each other over HTTP.

Why apart from ``messages``: these travel (``lbpod.core.wire`` puts them into versioned MessagePack and checks them),
events and effects never do. All are msgspec structs; flows, records and slots are bytes of the layouts of the maps, so
that nothing has to be converted on the way into a NumPy array.
"""

from enum import Enum

import msgspec

from lbpod.core.model import Snapshot


# --- Bodies: controller and LB ----------------------------------------------------------------------------------------
class RingStep(Enum):
    """How far an LB is in a ring change (DESIGN: section 4). NONE: none is under way here; PREPARED: `next` is known;
    HANDED: and what this LB had to hand over has arrived; SWITCHED: `own` is the new ring, `prev` the old one."""

    NONE = "none"
    PREPARED = "prepared"
    HANDED = "handed"
    SWITCHED = "switched"


class LbStatus(msgspec.Struct, frozen=True):
    """Answer to every call of the controller, and of GET /v1/state: where this LB stands.

    Invariants: committed <= prepared <= staged where the latter are not 0; ring_step is PREPARED or HANDED only where
    `prepared` names a generation that changes the ring, SWITCHED only where `committed` does.
    """

    node: str
    member: int
    committed: int
    """Generation in force; 0: none yet."""
    prepared: int
    """Generation prepared and not yet committed; 0: none."""
    staged: int
    """Generation of the snapshot last accepted; 0: none."""
    digest: bytes
    """Of the snapshot that `staged` names (snapshot.digest_of)."""
    ring_epoch: int
    tracking_slots: int
    problem: str = ""
    """One sentence where something is wrong, else empty."""
    snapshot: Snapshot | None = None
    """The newest snapshot known, where the caller asked for it (a controller that starts)."""
    in_force: Snapshot | None = None
    """That of `committed`, where the caller asked for the newest one and that is another."""
    ring_step: RingStep = RingStep.NONE
    ring_round: int = 0
    """The newest round of the handover that this LB knows: done where ring_step is HANDED, else under way; 0: none."""
    serving: bool = False
    """It is in the ring that is in force here, with the state of its slots. False: what is relayed to it is lost."""
    leaving: bool = False
    """It asks to be taken out of the ring."""
    given_up: tuple[int, ...] = ()
    """Members that it has found silent for LOST_NS, ascending."""
    tracking: tuple[tuple[int, int], ...] = ()
    """(VIP id, slots of it that track), ascending; only VIPs of which any does. `tracking_slots` is their sum."""


class PrepareCall(msgspec.Struct, frozen=True):
    """POST /v1/prepare. The snapshot must have been staged; digest: that of the snapshot."""

    generation: int
    digest: bytes


class CommitCall(msgspec.Struct, frozen=True):
    """POST /v1/commit. Must have been prepared."""

    generation: int
    digest: bytes


class RingPrepareCall(msgspec.Struct, frozen=True):
    """POST /v1/ring/prepare: learn `next`, the ring of the staged generation."""

    generation: int
    digest: bytes


class HandoverCall(msgspec.Struct, frozen=True):
    """POST /v1/ring/handover: send what you have of the slots of which you are the first live replica to those who will
    be replicas. lost: members that are down. A loss begins a new round; round >= 1."""

    generation: int
    digest: bytes
    round: int
    lost: tuple[int, ...] = ()


class RingSwitchCall(msgspec.Struct, frozen=True):
    """POST /v1/ring/switch: prev := own, own := next."""

    generation: int
    digest: bytes


class RingDoneCall(msgspec.Struct, frozen=True):
    """POST /v1/ring/done: everybody has switched; prev and what belongs to it may go."""

    generation: int
    digest: bytes


# --- Bodies: LB and LB, LB and host agent -----------------------------------------------------------------------------
class ResolveCall(msgspec.Struct, frozen=True):
    """POST /v1/flows/resolve: up to BATCH_MAX flows, as bytes of layout.FLOW."""

    member: int
    flows: bytes


class ResolveAnswer(msgspec.Struct, frozen=True):
    """For each flow, in order: backend id (u32, 0: cannot tell) and lease (u32 ms, 0: do not keep)."""

    backends: bytes
    leases_ms: bytes


class SettleStep(Enum):
    """ASK: owner to backup, may this settle? OWED: the same two, no answer to that has come; what is base there?
    (Through another LB, where the owner does not hear the backup.)
    TELL: owner to everyone, it has settled. LOOK: an LB that still tracks to the owner (the owner to the backup), has
    it settled already? It repairs what a lost TELL leaves behind."""

    ASK = "ask"
    OWED = "owed"
    TELL = "tell"
    LOOK = "look"


class SettleKind(Enum):
    """SETTLE ends tracking; REBASE (UDP) moves base to current and goes on tracking."""

    SETTLE = "settle"
    REBASE = "rebase"


class SettleCall(msgspec.Struct, frozen=True):
    """POST /v1/slots/settle. slots: bytes of u16; epoch: generation committed; early_backends: bytes of u32, the
    backends whose host agents (or whose death) vouch that no live flow is left, empty where the quiet time itself has
    passed."""

    member: int
    step: SettleStep
    kind: SettleKind
    vip: int
    epoch: int
    slots: bytes
    early_backends: bytes = b""


class SettleAnswer(msgspec.Struct, frozen=True):
    """Slots that the backup agrees to (bytes of u16) and the backend it has made their base (bytes of u32); to OWED:
    slots of which it is the backup, and what is their base there."""

    slots: bytes
    bases: bytes


class ForgetCall(msgspec.Struct, frozen=True):
    """POST /v1/flows/forget: records that the owner has not seen for longer than idle, bytes of layout.FLOW."""

    member: int
    flows: bytes


class ForgetAnswer(msgspec.Struct, frozen=True):
    """For each flow one byte: 1: nothing seen of it here either, forgotten."""

    agreed: bytes


class QuietCall(msgspec.Struct, frozen=True):
    """POST /v1/slots/quiet, to a host agent: which of these slots (bytes of u16) of this VIP still have a live flow to
    one of these backends (bytes of u32) on your node?"""

    vip: int
    slots: bytes
    backends: bytes


class QuietAnswer(msgspec.Struct, frozen=True):
    """can_tell False: nothing is known. quiet: one byte for each slot, 1: no live flow."""

    can_tell: bool
    quiet: bytes


class StateCall(msgspec.Struct, frozen=True):
    """PUT /v1/slots/state: one page of a handover. It may come twice, and pages in any order.

    covered: bytes of u16, the slots that the sender hands over to this receiver, ascending, the same in all pages.
    Either words: of `vip`, those of `covered` that track at the sender (tracking: bytes of u16, words: of u64; the
    others are steady there), or steady_vips (bytes of u32): VIPs of which all of them are steady. And records: flows
    and records in the layouts of the maps; the first full_count of them are full, the rest embryonic.
    """

    member: int
    generation: int
    round: int
    covered: bytes
    vip: int = 0
    """0: no words in this page."""
    tracking: bytes = b""
    words: bytes = b""
    steady_vips: bytes = b""
    flows: bytes = b""
    records: bytes = b""
    full_count: int = 0


class StateAnswer(msgspec.Struct, frozen=True):
    """The page has been written. taken: records that found room (the others are counted, and fall back to base)."""

    taken: int


class MissedCall(msgspec.Struct, frozen=True):
    """PUT /v1/flows/missed: up to BATCH_MAX flows (bytes of layout.FLOW) that the caller has recorded, or seen, while
    the receiver was silent, their backends, and for how many ms each has not been seen (bytes of u32 both); the first
    full_count of them are full records."""

    member: int
    flows: bytes
    backends: bytes
    ages_ms: bytes
    full_count: int


class MissedAnswer(msgspec.Struct, frozen=True):
    """They are recorded. taken: those that mean something to the receiver."""

    taken: int


class BeatCall(msgspec.Struct, frozen=True):
    """On /v1/beats: are you there? The caller's own state comes along, so that both learn from one call. down: members
    that it has found to be silent itself. returning: it was cut off, and waits to be told what it has missed.
    ask_back: it does not ask for both."""

    member: int
    generation: int
    ring_epoch: int
    down: tuple[int, ...] = ()
    returning: bool = False
    ask_back: bool = False


class BeatAnswer(msgspec.Struct, frozen=True):
    """serving: as in LbStatus. generation: in force there. returning: as in BeatCall. owes: it has yet to send the
    caller what that has missed."""

    member: int
    generation: int
    ring_epoch: int
    serving: bool
    down: tuple[int, ...] = ()
    returning: bool = False
    owes: bool = False


PeerCall = ResolveCall | SettleCall | ForgetCall | QuietCall | StateCall | MissedCall | BeatCall
PeerAnswer = ResolveAnswer | SettleAnswer | ForgetAnswer | QuietAnswer | StateAnswer | MissedAnswer | BeatAnswer
RingCall = RingPrepareCall | HandoverCall | RingSwitchCall | RingDoneCall
ControlCall = PrepareCall | CommitCall | Snapshot | RingCall
