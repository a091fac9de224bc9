"""What is said: the bodies on the wire, and the events and effects of the two brains.

Why one place: these are the whole interface of ``Planner.step`` and ``Keeper.step`` and of the HTTP calls between the
parts, so a shell can be written, and a simulator, without reading how anything is decided. Bodies (``bodies``, handed
on from here) are msgspec structs; events and effects are plain frozen dataclasses.

How a shell runs a brain: feed one event, then carry out the effects *in their order*. An effect that touches the
datapath and fails ends the list: the rest is not carried out, and ``EffectsFailed`` (the failed one, the rest, why) is
the next event. Questions (``Ask``, ``Look*``) carry a token and are answered later by exactly one event with the same
token. Flows, records and slots travel as NumPy arrays of ``lbpod.core.layout``; on the wire as their bytes.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lbpod.core.bodies import (
    BeatAnswer as BeatAnswer,
    BeatCall as BeatCall,
    CommitCall as CommitCall,
    ControlCall as ControlCall,
    ForgetAnswer as ForgetAnswer,
    ForgetCall as ForgetCall,
    HandoverCall as HandoverCall,
    LbStatus as LbStatus,
    PeerAnswer as PeerAnswer,
    PeerCall as PeerCall,
    PrepareCall as PrepareCall,
    QuietAnswer as QuietAnswer,
    QuietCall as QuietCall,
    ResolveAnswer as ResolveAnswer,
    ResolveCall as ResolveCall,
    RingCall as RingCall,
    RingDoneCall as RingDoneCall,
    RingPrepareCall as RingPrepareCall,
    RingStep as RingStep,
    RingSwitchCall as RingSwitchCall,
    SettleAnswer as SettleAnswer,
    SettleCall as SettleCall,
    SettleKind as SettleKind,
    SettleStep as SettleStep,
    StateAnswer as StateAnswer,
    StateCall as StateCall,
)
from lbpod.core.model import NextIds, Snapshot, World

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

NO_IDS = NextIds()
"""None given yet."""


# --- Keeper: events ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Restored:
    """First event after a restart on pinned maps: the snapshots that the agent had kept, and the slots as found."""

    committed: Snapshot | None
    prepared: Snapshot | None
    slots: dict[int, U64]
    ring_done: bool = True
    """As in Remember."""


@dataclass(frozen=True)
class Called:
    """The controller or a peer calls; to be answered by Reply or Refuse with the same request number."""

    request: int
    body: ControlCall | PeerCall
    with_snapshot: bool = False


@dataclass(frozen=True)
class Answered:
    """The answer to an Ask."""

    token: int
    body: PeerAnswer


@dataclass(frozen=True)
class AskFailed:
    """An Ask that failed: refused, timed out, or could not be sent."""

    token: int
    reason: str


@dataclass(frozen=True)
class PendingDrained:
    """Flows that the fast path relayed without knowing: FLOW keys and PENDING values."""

    flows: Rows
    values: Rows


@dataclass(frozen=True)
class RecordsLooked:
    """Answer to LookRecords: RECORD for each flow (flags RECORD_MISSING: none)."""

    token: int
    records: Rows


@dataclass(frozen=True)
class RecordsDumped:
    """Answer to DumpRecords: all of records (the first full_count), then of embryonic."""

    token: int
    flows: Rows
    records: Rows
    full_count: int


@dataclass(frozen=True)
class RecordsPut:
    """Answer to PutRecords: how many found room."""

    token: int
    taken: int


@dataclass(frozen=True)
class NatLooked:
    """Answer to LookNat: NAT_KEY and NAT rows, and where to go on (None: that was all).

    room: entries from which the map may begin to evict. full_ns: when it last may have, as StampNatFull has left it (0:
    never), said with the last answer.
    """

    token: int
    keys: Rows
    values: Rows
    cursor: int | None
    room: int
    full_ns: int


@dataclass(frozen=True)
class SeenRead:
    """Answer to LookSeen: other_seen of the VIP (u64[SLOT_COUNT]) and vip_stats.unrecorded_ns."""

    token: int
    other_seen: U64
    unrecorded_ns: int


@dataclass(frozen=True)
class MemberSeen:
    """The shell has found a member up or down (by other means than beats)."""

    member: int
    up: bool


@dataclass(frozen=True)
class ControllerSeen:
    """The controller has looked at this LB's state: it is there, though it has called for nothing."""


@dataclass(frozen=True)
class Woke:
    """For longer than the margin this agent did not run, or its clock has leapt: nobody can say which. Comes first."""

    slept_ns: int
    """How long, by that clock."""


@dataclass(frozen=True)
class LeaveWanted:
    """This LB is to be taken out of the ring (SIGTERM)."""


@dataclass(frozen=True)
class EffectsFailed:
    """A datapath effect failed; `rest` was not carried out."""

    failed: "KeeperEffect"
    rest: tuple["KeeperEffect", ...]
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed (about every TICK_NS)."""


KeeperEvent = (
    Restored
    | Called
    | Answered
    | AskFailed
    | PendingDrained
    | RecordsLooked
    | RecordsDumped
    | NatLooked
    | SeenRead
    | MemberSeen
    | ControllerSeen
    | Woke
    | RecordsPut
    | LeaveWanted
    | EffectsFailed
    | Tick
)


# --- Keeper: effects --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Configure:
    """Write everything but slots that a snapshot (or two: committed and prepared) says: config, VIP index, backends,
    nodes, members, the tunnel's door. The shell turns it into rows; alive: ids of backends that may be chosen."""

    committed: Snapshot | None
    prepared: Snapshot | None
    alive: frozenset[int]
    members_up: frozenset[int]
    ring_done: bool = True
    """The members that the ring of `committed` follows upon (Ring.before) count no more."""
    members_doubted: frozenset[int] = frozenset()
    """Believed to be down, not for long. Those in neither are given up."""


@dataclass(frozen=True)
class WriteOwnership:
    """u32[SLOT_COUNT] each; None: all MEMBER_NONE."""

    own: U32
    next: U32 | None = None
    prev: U32 | None = None


@dataclass(frozen=True)
class CreateVip:
    """Slots of this VIP are needed from now on."""

    vip: int


@dataclass(frozen=True)
class DeleteVip:
    """They are not needed any more."""

    vip: int


@dataclass(frozen=True)
class WriteSlots:
    """Slot words (layout.SLOT_*) at these slots."""

    vip: int
    slots: U32
    words: U64


@dataclass(frozen=True)
class PutCache:
    """Leases: FLOW keys, LEASE values."""

    flows: Rows
    leases: Rows


@dataclass(frozen=True)
class DropRecords:
    """Delete these flows from records and embryonic."""

    flows: Rows


@dataclass(frozen=True)
class PutRecords:
    """Insert records that another replica has handed over; the first full_count are full, the rest embryonic. A full
    record that is there already stays. Answered by RecordsPut."""

    token: int
    flows: Rows
    records: Rows
    full_count: int


@dataclass(frozen=True)
class DropFlows:
    """Forget all leases, records and embryonic records: this LB is new to the ring, and what it knew is not true any
    more."""


@dataclass(frozen=True)
class LookRecords:
    """Ask for the records of these flows: RecordsLooked."""

    token: int
    flows: Rows


@dataclass(frozen=True)
class DumpRecords:
    """Ask for all records: RecordsDumped."""

    token: int


@dataclass(frozen=True)
class LookNat:
    """Ask for some thousands of the translated flows: NatLooked. cursor: None to begin, else what the last answer said.

    The answer need not come at once: a shell may do something else first.
    """

    token: int
    cursor: int | None


@dataclass(frozen=True)
class DropNat:
    """Delete those of these translated flows (NAT_KEY) that have not been seen since (u64)."""

    keys: Rows
    seen_ns: U64


@dataclass(frozen=True)
class StampNatFull:
    """Keep with the maps when the map of translated flows last may have evicted (vip_stats[0], which is no VIP's)."""

    at_ns: int


@dataclass(frozen=True)
class LookSeen:
    """Ask for the stamps of a VIP: SeenRead."""

    token: int
    vip: int


@dataclass(frozen=True)
class Ask:
    """Call a node's agent (node id of the newest snapshot): Answered or AskFailed with this token."""

    token: int
    node: int
    body: PeerCall


@dataclass(frozen=True)
class Tell:
    """Call a node's agent and do not care for the answer (a lost one only costs needless tracking)."""

    node: int
    body: PeerCall


@dataclass(frozen=True)
class Reply:
    """Answer a call with 200."""

    request: int
    body: LbStatus | PeerAnswer


@dataclass(frozen=True)
class Refuse:
    """Answer a call with a 4xx (their mistake) or 503 (not now) and one sentence."""

    request: int
    status: int
    sentence: str


@dataclass(frozen=True)
class Remember:
    """Keep these on disk, so that a restarted agent can go on (committed and prepared snapshots)."""

    committed: Snapshot | None
    prepared: Snapshot | None
    ring_done: bool = True
    """False: the ring change of `committed` is switched to, and not done."""


@dataclass(frozen=True)
class Trace:
    """One line for people (/v1/trace, log): what happened and why. Never needed for correctness."""

    what: str
    vip: int = 0
    slots: int = 0
    detail: str = ""


DatapathEffect = (
    Configure
    | WriteOwnership
    | CreateVip
    | DeleteVip
    | WriteSlots
    | PutCache
    | DropRecords
    | PutRecords
    | DropFlows
    | LookRecords
    | DumpRecords
    | LookNat
    | DropNat
    | StampNatFull
    | LookSeen
)
KeeperEffect = DatapathEffect | Ask | Tell | Reply | Refuse | Remember | Trace


# --- Planner: events --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WorldSeen:
    """What is wanted, whole."""

    world: World


@dataclass(frozen=True)
class LbAnswered:
    """A node's agent answered a call (generation: the one the call was about, 0 for AskStatus)."""

    node: str
    generation: int
    status: LbStatus


@dataclass(frozen=True)
class LbFailed:
    """A call failed. refused: it answered 4xx (`reason` is its sentence), else it was silent or unreachable."""

    node: str
    generation: int
    refused: bool
    reason: str


@dataclass(frozen=True)
class Persisted:
    """The generation is written down; it may be pushed now."""

    generation: int


@dataclass(frozen=True)
class PersistFailed:
    """It is not. highest: what was found instead, where somebody else wrote (0: unknown), and where its search for free
    ids had come to: so even two controllers that do not see each other's pushes never give one id twice."""

    generation: int
    highest: int
    reason: str
    next_ids: NextIds = NO_IDS


PlannerEvent = WorldSeen | LbAnswered | LbFailed | Persisted | PersistFailed | Tick


# --- Planner: effects -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Persist:
    """Write this generation and ``snapshot.next_ids`` down before anything of it is pushed; but where what is written
    down is newer than ``after``, change nothing and say what it is (compare-and-swap)."""

    generation: int
    snapshot: Snapshot
    after: int


@dataclass(frozen=True)
class AskStatus:
    """GET /v1/state, with ?snapshot=1 where the newest snapshot is wanted, too."""

    node: str
    control: str
    with_snapshot: bool


@dataclass(frozen=True)
class Push:
    """A call of the controller, by the body's type (wire.ROUTES)."""

    node: str
    control: str
    generation: int
    body: ControlCall


@dataclass(frozen=True)
class VipStatus:
    """What people want to know about one VIP."""

    name: str
    epoch: int
    ready: int
    draining: int


class Phase(Enum):
    """What a controller is waiting for: STARTING: what the LBs know; IDLE: nothing, all that is wanted is in force;
    PERSISTING: the generation to be written down; the others: ring members to have done that step."""

    STARTING = "starting"
    IDLE = "idle"
    PERSISTING = "persisting"
    STAGING = "staging"
    PREPARING = "preparing"
    COMMITTING = "committing"
    RING_PREPARING = "ring preparing"
    HANDING_OVER = "handing over"
    SWITCHING = "switching"
    RING_ENDING = "ring ending"


@dataclass(frozen=True)
class PlannerStatus:
    """Where the controller stands. generation: the newest that is pushed or in force, 0: none; lbs: of the ring (of the
    new one, where it changes); lagging: nodes that are behind and do not answer, refuse, or were left behind; ring:
    names of its members; lost: names of those believed lost; problem: one sentence or empty."""

    phase: Phase
    generation: int
    lbs: int
    lbs_at_generation: int
    lagging: tuple[str, ...]
    problem: str
    changes: int
    vips: tuple[VipStatus, ...]
    ring: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    ring_changes: int = 0


@dataclass(frozen=True)
class Report:
    """The status has changed."""

    status: PlannerStatus


PlannerEffect = Persist | AskStatus | Push | Report
