"""What a Keeper remembers of the other members of its ring: whom it has heard and when, and what they may have missed.

A part of its State, apart because it outlives what the rest is about (snapshots, slots, rounds) and is the watch's
alone to change (``watch``, ``missed``).
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Watch:
    """Whom this LB has heard, and when (``watch``). Members are those of the ring, without this one."""

    heard_ns: dict[int, int] = field(default_factory=dict)
    """When each was last heard; of one that is watched and was never heard: since when it is watched."""
    asked_ns: dict[int, int] = field(default_factory=dict)
    """When each was first asked since it was last heard, or should have asked itself. Invariant: without an entry
    neither was the case since."""
    spoke_ns: dict[int, int] = field(default_factory=dict)
    """When each with a lower id last asked. Invariant: without an entry it is not counted upon to ask; after a tick,
    only of those that are watched."""
    turned_ns: dict[int, int] = field(default_factory=dict)
    """When this LB last changed its mind about each."""
    agentless_ns: dict[int, int] = field(default_factory=dict)
    """When the machine of each last said that nobody listens there. Without an entry: not since it was heard."""
    late_ns: dict[int, int] = field(default_factory=dict)
    """When the first answer came, of each that is believed down, that had been long on its way."""
    met: set[int] = field(default_factory=set)
    """Those that have been heard at all since this agent started."""
    hearsay: set[int] = field(default_factory=set)
    """Those that are believed to be down, and that this agent has not found silent itself yet: others have, or an
    earlier agent."""
    chosen: tuple[object, frozenset[int], tuple[int, ...]] | None = None
    """Who is watched in a large ring, and what that was worked out from: the owners of all slots, the others."""
    open: dict[int, int] = field(default_factory=dict)
    """Beats to each that wait for an answer. Invariant: 1..BEATS_OPEN_MAX, BEATS_MAX in all."""
    said_down: dict[int, frozenset[int]] = field(default_factory=dict)
    """Member -> whom it has found silent, when it last spoke."""
    suspects: set[int] = field(default_factory=set)
    """Those that another LB has found silent and that this one does not watch anyway. They are asked until heard."""
    turn: int = 0
    """Which of those that are not watched anyway come first with the next beats."""
    beats: int = 0
    """How often beats have been due."""
    beat_at_ns: int = 0
    """When the next beats are due."""
    ticked_ns: int = 0
    """When the last tick came; 0: none has."""
    peer_ns: int = 0
    """When a peer was last heard."""
    answered_ns: int = 0
    """When the last beat was asked that was answered."""
    controller_ns: int = 0
    """When the controller was last heard."""
    ahead: int = 0
    """The newest generation that a peer has said to be in force."""
    doubt_ns: int = 0
    """Since when this LB may have been left out of what is in force elsewhere; 0: it has not."""
    given_up_before: set[int] = field(default_factory=set)
    """Whom the agent before this one had given up, and this one has not heard yet: said to the controller, as a witness
    (``planner_ring``). To the fast path they are doubted, until this agent has not heard them for LOST_NS either."""
    fenced_why: str = ""
    """One sentence while this LB is fenced, else empty."""
    fenced_count: int = 0
    """Times that it has fenced itself."""
    told_ns: int = 0
    """When the controller first spoke in this doubt, or in one before."""
    missed: dict[int, int] = field(default_factory=dict)
    """Member -> since when it may have missed what was recorded here (``missed``)."""
    missed_at_ns: int = 0
    """When that is looked at again."""
    telling: Counter[int] = field(default_factory=Counter)
    """Member -> questions and calls under way that end in its having been sent that. Invariant: 1 or more."""
    returning: dict[int, int] = field(default_factory=dict)
    """Member that waits for that -> when it last said so."""
    held_ns: dict[int, int] = field(default_factory=dict)
    """Member whose list waits for what it has made base (``owed``) -> since when."""
    owed_by: set[int] = field(default_factory=set)
    """Members that have not said that they have sent all that this LB has missed, since it heard nobody."""
    long_silent: set[int] = field(default_factory=set)
    """Of those, who had fallen silent well before the others did and has not spoken since."""
    back_ns: int = 0
    """When it first heard one of them again; 0: not yet, or it has missed nothing."""
