"""What is said: the bodies on the wire, and the events and effects of the two brains.

Why one place: these are the whole interface of ``Planner.step`` and ``Keeper.step`` and of the HTTP calls between the
parts, so a shell can be written, and a simulator, without reading how anything is decided. All are frozen structs of
msgspec: the bodies (``bodies``, handed on from here) for the wire, events and effects because fifty dataclasses, each
of which compiles its own methods, took 30 ms of every start.

How a shell runs a brain: feed one event, then carry out the effects *in their order*. An effect that touches the
datapath and fails ends the list: the rest is not carried out, and ``EffectsFailed`` (the failed one, the rest, why) is
the next event. Questions (``Ask``, ``Look*``) carry a token and are answered later by exactly one event with the same
token. Flows, records and slots travel as NumPy arrays of ``lbpod.core.layout``; on the wire as their bytes.
"""

from enum import Enum
from functools import lru_cache

import msgspec
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
    MissedAnswer as MissedAnswer,
    MissedCall as MissedCall,
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
from lbpod.core.limits import VIPS_MAX
from lbpod.core.model import NextIds, Protocol, Snapshot, Vip, World, WorldVip, format_address

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.void]

NO_IDS = NextIds()
"""None given yet."""


# --- Keeper: events ---------------------------------------------------------------------------------------------------
class Restored(msgspec.Struct, frozen=True):
    """First event after a restart on pinned maps: the snapshots that the agent had kept, and what was found there."""

    committed: Snapshot | None
    prepared: Snapshot | None
    slots: dict[int, U64]
    ring_done: bool = True
    """As in Remember."""
    down: frozenset[int] = frozenset()
    """Members that the fast path takes for down."""
    given_up: frozenset[int] = frozenset()
    """Those of them that have been silent for LOST_NS."""


class Called(msgspec.Struct, frozen=True):
    """The controller or a peer calls; to be answered by Reply or Refuse with the same request number."""

    request: int
    body: ControlCall | PeerCall
    with_snapshot: bool = False
    late: bool = False
    """A beat that was on its way for so long that it says nothing about who is there now."""


class Answered(msgspec.Struct, frozen=True):
    """The answer to an Ask."""

    token: int
    body: PeerAnswer


class AskFailed(msgspec.Struct, frozen=True):
    """An Ask that failed: refused, timed out, or could not be sent. untaken: it is certain that nobody has acted on
    it. agentless: the node itself has refused the connection, so it is there, and its agent is not."""

    token: int
    reason: str
    untaken: bool = False
    agentless: bool = False


class PendingDrained(msgspec.Struct, frozen=True):
    """Flows that the fast path relayed without knowing: FLOW keys and PENDING values."""

    flows: Rows
    values: Rows


class RecordsLooked(msgspec.Struct, frozen=True):
    """Answer to LookRecords: RECORD for each flow (round RECORD_MISSING: none). embryonic: (n,), which of them are of a
    flow of which no more than its SYN was seen."""

    token: int
    records: Rows
    embryonic: Bools
    other_seen: U64 | None = None
    """(n,): the stamps of their slots, where they were asked for."""


class RecordsDumped(msgspec.Struct, frozen=True):
    """Answer to DumpRecords: some of records (the first full_count), then of embryonic, and where to go on (None: that
    was all)."""

    token: int
    flows: Rows
    records: Rows
    full_count: int
    cursor: tuple[bool, int] | None = None
    """Whether the embryonic ones are through, and where in the map at hand."""


class RecordsPut(msgspec.Struct, frozen=True):
    """Answer to PutRecords: how many found room."""

    token: int
    taken: int


class NatLooked(msgspec.Struct, frozen=True):
    """Answer to LookNat: NAT_KEY and NAT rows of one of the two maps, and where to go on (None: that was all of both).

    assured: they are of `nat`, and not of `unassured`, which comes first. room: entries from which that map may begin
    to evict. full_ns: when either last may have, as StampNatFull has left it (0: never), said with the last answer.
    """

    token: int
    keys: Rows
    values: Rows
    assured: bool
    cursor: tuple[bool, int | None] | None
    room: int
    full_ns: int


class SeenRead(msgspec.Struct, frozen=True):
    """Answer to LookSeen: other_seen of the VIP (u64[SLOT_COUNT]) and vip_stats.unrecorded_ns."""

    token: int
    other_seen: U64
    unrecorded_ns: int


class MemberSeen(msgspec.Struct, frozen=True):
    """The shell has found a member up or down (by other means than beats)."""

    member: int
    up: bool


class ControllerSeen(msgspec.Struct, frozen=True):
    """The controller has looked at this LB's state: it is there, though it has called for nothing."""


class Woke(msgspec.Struct, frozen=True):
    """For longer than the margin this agent did not run, or its clock has leapt: nobody can say which. Comes first."""

    slept_ns: int
    """How long, by that clock."""


class LeaveWanted(msgspec.Struct, frozen=True):
    """This LB is to be taken out of the ring (SIGTERM)."""


class EffectsFailed(msgspec.Struct, frozen=True):
    """A datapath effect failed; `rest` was not carried out."""

    failed: "KeeperEffect"
    rest: tuple["KeeperEffect", ...]
    reason: str


class Tick(msgspec.Struct, frozen=True):
    """Time has passed (about every TICK_NS; an agent at rest waits for its next beats)."""


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
class Configure(msgspec.Struct, frozen=True):
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


class WriteOwnership(msgspec.Struct, frozen=True):
    """u32[SLOT_COUNT] each; None: all MEMBER_NONE."""

    own: U32
    next: U32 | None = None
    prev: U32 | None = None


class CreateVip(msgspec.Struct, frozen=True):
    """Slots of this VIP are needed from now on."""

    vip: int


class DeleteVip(msgspec.Struct, frozen=True):
    """They are not needed any more."""

    vip: int


class WriteSlots(msgspec.Struct, frozen=True):
    """Slot words (layout.SLOT_*) at these slots."""

    vip: int
    slots: U32
    words: U64


class PutCache(msgspec.Struct, frozen=True):
    """Leases: FLOW keys, LEASE values."""

    flows: Rows
    leases: Rows


class DropRecords(msgspec.Struct, frozen=True):
    """Delete these from records and embryonic, where they still are as they were looked at. (A five-tuple that is used
    again meanwhile has a record of its own, and a live flow.)"""

    flows: Rows
    records: Rows


class PutRecords(msgspec.Struct, frozen=True):
    """Insert records that another replica has handed over; the first full_count are full, the rest embryonic. One that
    is there already stays, but for where it names another backend and was seen earlier. Answered by RecordsPut."""

    token: int
    flows: Rows
    records: Rows
    full_count: int
    seen_ns: U64 | None = None
    """When each was seen, by this LB's clock; None: nobody knows, so what is there already stays."""


class DropFlows(msgspec.Struct, frozen=True):
    """Forget all leases, records and embryonic records: this LB is new to the ring, and what it knew is not true any
    more."""


class LookRecords(msgspec.Struct, frozen=True):
    """Ask for the records of these flows: RecordsLooked."""

    token: int
    flows: Rows
    slots: U32 | None = None
    """(n,): of each flow, where the stamp of its slot is wanted, too."""


class DumpRecords(msgspec.Struct, frozen=True):
    """Ask for some thousands of all records: RecordsDumped. cursor: None to begin, else what the last answer said.

    A shell may do something else before it goes on from a cursor, but nothing between looking and answering: what the
    Keeper drops is what it has just been shown.
    """

    token: int
    cursor: tuple[bool, int] | None = None


class LookNat(msgspec.Struct, frozen=True):
    """Ask for some thousands of the translated flows: NatLooked. cursor: None to begin, else what the last answer said.

    The answer need not come at once: a shell may do something else first.
    """

    token: int
    cursor: tuple[bool, int | None] | None


class DropNat(msgspec.Struct, frozen=True):
    """Delete those of these translated flows (NAT_KEY) that have not been seen since (u64), out of `nat` (assured) or
    `unassured`."""

    assured: bool

    keys: Rows
    seen_ns: U64


class StampNatFull(msgspec.Struct, frozen=True):
    """Keep with the maps when one of translated flows last may have evicted (vip_stats[0], which is no VIP's)."""

    at_ns: int


class LookSeen(msgspec.Struct, frozen=True):
    """Ask for the stamps of a VIP: SeenRead."""

    token: int
    vip: int


class Ask(msgspec.Struct, frozen=True):
    """Call a node's agent (node id of the newest snapshot): Answered or AskFailed with this token."""

    token: int
    node: int
    body: PeerCall


class Tell(msgspec.Struct, frozen=True):
    """Call a node's agent and do not care for the answer (a lost one only costs needless tracking)."""

    node: int
    body: PeerCall


class Reply(msgspec.Struct, frozen=True):
    """Answer a call with 200."""

    request: int
    body: LbStatus | PeerAnswer


class Refuse(msgspec.Struct, frozen=True):
    """Answer a call with a 4xx (their mistake) or 503 (not now) and one sentence."""

    request: int
    status: int
    sentence: str


class Remember(msgspec.Struct, frozen=True):
    """Keep these on disk, so that a restarted agent can go on (committed and prepared snapshots)."""

    committed: Snapshot | None
    prepared: Snapshot | None
    ring_done: bool = True
    """False: the ring change of `committed` is switched to, and not done."""


class Trace(msgspec.Struct, frozen=True):
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
class WorldSeen(msgspec.Struct, frozen=True):
    """What is wanted, whole."""

    world: World


class LbAnswered(msgspec.Struct, frozen=True):
    """A node's agent answered a call (generation: the one the call was about, 0 for AskStatus)."""

    node: str
    generation: int
    status: LbStatus


class LbFailed(msgspec.Struct, frozen=True):
    """A call failed. refused: it answered 4xx (`reason` is its sentence), else it was silent or unreachable."""

    node: str
    generation: int
    refused: bool
    reason: str


class Persisted(msgspec.Struct, frozen=True):
    """The generation is written down; it may be pushed now."""

    generation: int


class PersistFailed(msgspec.Struct, frozen=True):
    """It is not. highest: what was found instead, where somebody else wrote (0: unknown), and where its search for free
    ids had come to: so even two controllers that do not see each other's pushes never give one id twice."""

    generation: int
    highest: int
    reason: str
    next_ids: NextIds = NO_IDS


PlannerEvent = WorldSeen | LbAnswered | LbFailed | Persisted | PersistFailed | Tick


# --- Planner: effects -------------------------------------------------------------------------------------------------
class Persist(msgspec.Struct, frozen=True):
    """Write this generation and ``snapshot.next_ids`` down before anything of it is pushed; but where what is written
    down is newer than ``after``, change nothing and say what it is (compare-and-swap)."""

    generation: int
    snapshot: Snapshot
    after: int


class AskStatus(msgspec.Struct, frozen=True):
    """GET /v1/state, with ?snapshot=1 where the newest snapshot is wanted, too."""

    node: str
    control: str
    with_snapshot: bool
    lb: bool = False
    """It is in the ring, or may join it: changes wait for it, and its silence counts."""


class Push(msgspec.Struct, frozen=True):
    """A call of the controller, by the body's type (wire.ROUTES)."""

    node: str
    control: str
    generation: int
    body: ControlCall
    lb: bool = False
    """As in AskStatus."""


class VipStatus(msgspec.Struct, frozen=True):
    """What people want to know about one VIP. place: its identity, as ``place_of`` writes it."""

    name: str
    epoch: int
    ready: int
    draining: int
    id: int = 0
    place: str = ""


def place_of(vip: Vip | WorldVip) -> str:
    """ADDRESS:PORT/PROTOCOL. A VIP may get another name; it is another one where this differs."""
    return _place(vip.address, vip.port, vip.protocol)


@lru_cache(maxsize=VIPS_MAX)  # they stay the same from one generation to the next, and writing an address takes 8 us
def _place(address: bytes, port: int, protocol: Protocol) -> str:
    return f"{format_address(address)}:{port}/{protocol.name}"


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


class PlannerStatus(msgspec.Struct, frozen=True):
    """Where the controller stands. generation: the newest that is pushed or in force, 0: none; lbs: of the ring (of the
    new one, where it changes); lagging: nodes that are behind and do not answer, refuse, or were left behind; ring:
    names of its members; lost: names of those believed lost; waiting: VIPs whose change waits for the next generation,
    for this one has enough to do; problem: one sentence or empty; vips: of the newest generation; in_force: of that
    which is in force, or of the newest where nobody has told."""

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
    waiting: int = 0
    in_force: tuple[VipStatus, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """The status has changed."""

    status: PlannerStatus


PlannerEffect = Persist | AskStatus | Push | Report
