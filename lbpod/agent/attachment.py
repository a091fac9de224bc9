"""hf_xdp and hf_tc on the uplink: put there at the start, looked after from then on, put back where they are gone.

Whoever takes them off tells nobody: `ip link set eth0 xdp off`, a clsact qdisc that somebody else's clean-up removes,
an interface that is made anew when its configuration is applied. Beats and calls go on, so the others count on this LB,
and every packet to a VIP that comes in here is lost. So what sits on the uplink is compared with our programs, by their
ids, whenever the agent looks after what changes seldom (LOOK_AFTER_NS).

Decided here: what follows. A program that is gone is attached again, with a line in the log and a count. Where that is
refused (a stranger's program has its place), this LB is not ready, says why, and tries again with the next look. An
interface that is gone takes its index with it, which stands in `config` and in `nodes`, and a start is what gets all
that right: so once an interface of that name would do for a start, this agent ends with a sentence, and its supervisor
starts the next one. Not before: until then it answers, and says what is missing. An MTU that has changed takes no new
start: whoever asks for `uplink` writes it on.

Left to others: how a program is attached, and what counts as ours (``datapath.attach``).
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from lbpod.agent.uplink import UplinkError, current
from lbpod.datapath.attach import XdpMode, attach_tc, attach_xdp, lost
from lbpod.datapath.loader import FastPath
from lbpod.datapath.misses import Miss
from lbpod.datapath.port import DatapathError
from lbpod.datapath.rows import Uplink

_LOG: Final = structlog.get_logger()

PROGRAMS: Final = ("hf_tc", "hf_xdp")
"""What sits on an uplink, in the order in which it comes there: what hf_xdp lets in, hf_tc has to know."""


class UplinkAnewError(DatapathError):
    """The uplink has been made anew, which takes a new start. str(): one sentence."""


class Attachment:
    """One agent's programs on its uplink.

    Invariant: `problem` is empty if and only if, as of the last look, both programs were in place.
    """

    def __init__(self, fast_path: FastPath, uplink: Uplink, find: Callable[[], Uplink]) -> None:
        """find: what a start would take for the uplink now; raises UplinkError where nothing would do."""
        self._fast_path = fast_path
        self.uplink = uplink
        """As of the last look: its name, its MTU and its MAC may change."""
        self._find = find
        self._missing = set(PROGRAMS)
        self._mode: XdpMode | None = None
        self._why = ""
        self.problem = f"the programs have not been attached to {uplink.name} yet"
        """Why VIP traffic would be lost; empty: it would not."""
        self.replaced = False
        """Both programs took the place of an earlier agent's."""
        self.miss: Miss | None = None
        """What the interface lacks."""
        self.again: Final[Counter[str]] = Counter()
        """Times that a program was gone and was attached again, by its name."""

    @property
    def mode(self) -> str:
        """native, generic, or none where hf_xdp is not on the uplink."""
        return "none" if self._mode is None or not self.has("hf_xdp") else self._mode.value

    @property
    def why(self) -> str:
        """Why this mode, or none."""
        return self._why if self.has("hf_xdp") else self.problem

    def has(self, program: str) -> bool:
        """Whether the uplink had it at the last look."""
        return program not in self._missing

    def attach(self) -> None:
        """Puts both programs on the uplink, in the place of an earlier agent's. Raises DatapathError."""
        replaced = [self._put(program, self.uplink.name) for program in PROGRAMS]
        self.replaced = all(replaced)
        self._missing.clear()
        self.problem = ""

    def look(self) -> None:
        """Puts back what is gone. Raises UplinkAnewError where only a new start can do that."""
        try:
            found = current(self.uplink)
            gone = lost(self._fast_path, self.uplink.ifindex) if found is not None else PROGRAMS
        except (UplinkError, DatapathError) as error:
            _LOG.warning("attachment not looked at", reason=str(error))  # it may have vanished just now
            return
        if found is None:
            self._wait_for_uplink()
            return
        self.uplink = found
        refused: dict[str, str] = {}
        for program in gone:
            try:
                self._put(program, found.name)
            except DatapathError as error:
                refused[program] = f"{program} is not attached to {found.name} any more: {error}"
            else:
                self.again[program] += 1
                _LOG.warning("attached again", program=program, interface=found.name, count=self.again[program])
        self._missing = set(refused)
        self._say("; ".join(refused.values()))

    def _put(self, program: str, interface: str) -> bool:
        """Attaches one; True where it took the place of an earlier one of ours. Raises DatapathError."""
        if program == "hf_tc":
            return attach_tc(self._fast_path, interface).replaced
        attached = attach_xdp(self._fast_path, interface)
        self._mode, self._why, self.miss = attached.mode, attached.reason, attached.miss
        return attached.replaced

    def _wait_for_uplink(self) -> None:
        name, index = self.uplink.name, self.uplink.ifindex
        self._missing = set(PROGRAMS)
        self._say(f"the interface {name} is gone, and the programs with it; this agent ends when it is there again")
        try:
            found = self._find()
        except UplinkError:
            return
        if found.name == name:
            raise UplinkAnewError(
                f"the interface {name} has been made anew (index {found.ifindex}, it was {index}), without the "
                "programs: start this agent again, and it attaches them"
            )

    def _say(self, problem: str) -> None:
        """Notes how it stands; a line in the log where that is new."""
        if problem and problem != self.problem:
            _LOG.error("not attached", sentence=problem)
        self.problem = problem
