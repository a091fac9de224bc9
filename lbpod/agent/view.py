"""What people and Prometheus get to see of an agent: one place that gathers it, several that print it.

Gathered from the driver's counters and the datapath's; nothing here changes anything. Entries in hash maps are not
counted: the kernel keeps no number, and walking a million entries for each scrape would cost more than it tells (the
verdicts say when something found no room). Bytes per VIP are what its arrays take, which is all that a VIP takes.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from lbpod.agent.attachment import Attachment
from lbpod.agent.clock import now_ns
from lbpod.agent.driver import Driver
from lbpod.agent.outbox import Outbox, Standing
from lbpod.agent.peers import Peers
from lbpod.certs import Credentials
from lbpod.core.limits import MEMBER_NONE, READY_WAIT_NS, SLOT_COUNT
from lbpod.core.messages import LbStatus
from lbpod.core.model import format_address
from lbpod.core.verdicts import Verdict
from lbpod.datapath.port import U64, Datapath

SLOT_BYTES: Final = 8
BYTES_PER_VIP: Final = 2 * SLOT_COUNT * SLOT_BYTES
"""Slots and other_seen. A flow in steady state takes 0."""
READY_LOOK_NS: Final = 20_000_000
"""Between two looks at whether a doubt has ended."""


@dataclass(frozen=True)
class Facts:
    """What was decided when the agent started."""

    version: str
    interface: str
    address: str
    maps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Entries that each map has room for."""

    taken_over: bool = False
    """An earlier agent's maps were found."""


class View:
    """Looks at one agent. Only from the loop's thread."""

    def __init__(
        self,
        driver: Driver,
        peers: Peers,
        credentials: Credentials,
        datapath: Datapath,
        facts: Facts,
        substitutes: Callable[[], Sequence[str]],
        outbox: Outbox | None,
        attachment: Attachment | None,
    ) -> None:
        self.driver: Final = driver
        self.peers: Final = peers
        self.credentials: Final = credentials
        self.facts: Final = facts
        self.attachment: Final = attachment
        """None: no interface is in play, on maps in memory."""
        self.refused: Final[Counter[tuple[str, int]]] = Counter()
        """Calls by path and status."""
        self._datapath = datapath
        self._substitutes = substitutes
        self._outbox = outbox
        self._started = datetime.now(UTC)

    def counters(self) -> U64:
        """uint64[len(Verdict), 2]: packets and bytes. Raises DatapathError."""
        return self._datapath.counters()

    def vip_count(self) -> int:
        """VIPs that have arrays."""
        return len(self._datapath.vip_ids())

    def xdp(self) -> dict[str, str]:
        """How hf_xdp sits on the uplink, and why so."""
        if self.attachment is None:
            return {"mode": "none", "why": "maps in memory"}
        return {"mode": self.attachment.mode, "why": self.attachment.why}

    def why_not_ready(self) -> str:
        """One sentence, or empty where VIP traffic may come.

        A fence is no reason: where it hears nobody, this LB may be the only one that is left.
        """
        status = self.driver.status
        if self.driver.leaving:
            return "this LB is leaving the ring; send it no more VIP traffic"
        if self.attachment is not None and self.attachment.problem:
            return self.attachment.problem
        if status.problem and not self.driver.beliefs.fenced_why:
            return status.problem
        if self.driver.failure:
            return f"what has failed has not succeeded since: {self.driver.failure}"
        listed = self.driver.listed_address()
        if listed is not None and format_address(listed) != self.facts.address:
            return (
                f"the controller lists this node as {format_address(listed)}, but its tunnel packets come from "
                f"{self.facts.address}, which other nodes refuse: set --node-address, or correct the list"
            )
        if status.committed == 0:
            return "no snapshot has been committed yet: the controller has not called"
        if status.member != MEMBER_NONE and not status.serving:
            return "this LB is not in the ring: the controller has not joined it yet, or has taken it out"
        if behind := self.driver.beliefs.behind:
            return (
                f"this LB was out of touch, and generation {behind} is in force elsewhere: "
                "send it no VIP traffic before the controller has brought that here"
            )
        if self.driver.beliefs.is_catching_up:
            return "this LB was out of touch, and others are about to tell it which flows have begun meanwhile"
        return ""

    async def why_not_ready_now(self) -> str:
        """The same for whoever acts on it. While this LB may have been left out and nobody has told it yet, the answer
        waits for up to READY_WAIT_NS: one that can be reached again hears from the others with a beat's next SYN."""
        deadline_ns = now_ns() + READY_WAIT_NS
        while now_ns() < deadline_ns:
            if not self.driver.beliefs.in_doubt or self.why_not_ready():
                break
            await asyncio.sleep(READY_LOOK_NS * 1e-9)
        return self.why_not_ready()

    def diagnostics(self) -> Standing | None:
        """How the writing to Redis goes; None where nothing is written."""
        return self._outbox.standing() if self._outbox is not None else None

    def summary(self) -> dict[str, str]:
        """The state in a few words, for Redis."""
        status, standing = self.driver.status, self.diagnostics()
        numbers = {
            "member": status.member,
            "committed": status.committed,
            "prepared": status.prepared,
            "staged": status.staged,
            "ring_epoch": status.ring_epoch,
            "vips": self.vip_count(),
            "tracking_slots": status.tracking_slots,
            "queue": self.driver.queue_count,
            "failed_effects": sum(self.driver.failures.values()),
            "dropped_entries": sum(standing.dropped.values()) if standing is not None else 0,
        }
        words = {
            "node": status.node,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "started": self._started.isoformat(timespec="seconds"),
            "version": self.facts.version,
            "address": self.facts.address,
            "xdp": self.xdp()["mode"],
            "ready": self.why_not_ready() or "yes",
            "problem": status.problem,
            "serving": "yes" if status.serving else "no",
            "leaving": "yes" if self.driver.leaving or status.leaving else "no",
            "ring_step": status.ring_step.value,
            "fenced": self.driver.beliefs.fenced_why or "no",
            "others": ", ".join(f"{name} {word}" for name, word in sorted(self._others().items())),
        }
        return words | {name: str(number) for name, number in numbers.items()}

    def _diagnostics(self) -> dict[str, Any]:
        standing = self.diagnostics()
        if standing is None:
            return {"redis": "off"}
        return {
            "redis": standing.trouble or "yes",
            "written": standing.written,
            "waiting": standing.waiting,
            "dropped": {why.value: count for why, count in sorted(standing.dropped.items())},
        }

    def state(self, status: LbStatus) -> dict[str, Any]:
        """The JSON of /v1/state. Raises DatapathError."""
        counted = self.counters()
        snapshot = status.snapshot
        return {
            "node": status.node,
            "member": status.member,
            "committed": status.committed,
            "prepared": status.prepared,
            "staged": status.staged,
            "digest": status.digest.hex(),
            "ring_epoch": status.ring_epoch,
            "ring_step": status.ring_step.value,
            "serving": status.serving,
            "leaving": status.leaving,
            "others": self._others(),
            "fenced": self.driver.beliefs.fenced_why or "no",
            "fences": self.driver.beliefs.fenced_count,
            "tracking_slots": status.tracking_slots,
            "problem": status.problem,
            "ready": self.why_not_ready() or "yes",
            "version": self.facts.version,
            "started": self._started.isoformat(timespec="seconds"),
            "interface": self.facts.interface,
            "address": self.facts.address,
            "xdp": self.xdp(),
            "substitutes": list(self._substitutes()),
            "taken_over": self.facts.taken_over,
            "maps": dict(sorted(self.facts.maps.items())),
            "vips": [
                {
                    "id": vip.id,
                    "name": vip.name,
                    "endpoint": f"{format_address(vip.address)}:{vip.port}/{vip.protocol.name}",
                    "epoch": vip.epoch,
                    "backends": len(vip.backends),
                    "bytes": BYTES_PER_VIP,
                }
                for vip in (snapshot.vips if snapshot is not None else ())
            ],
            "bytes_per_vip": BYTES_PER_VIP,
            "bytes_per_flow_steady": 0,
            "packets": {each.name.lower(): int(counted[each, 0]) for each in Verdict if counted[each, 0]},
            "pending_flows": self.driver.drained_flows,
            "resolved_flows": self.driver.resolved_flows,
            "looked_up_flows": self.driver.looked_up_flows,
            "swept_flows": self.driver.swept_flows,
            "queue": self.driver.queue_count,
            "calls_under_way": self.peers.under_way_count,
            "failed_effects": sum(self.driver.failures.values()),
            "failed_calls": dict(sorted(self.peers.failed.items())),
            "refused_calls": {f"{path} {status}": count for (path, status), count in sorted(self.refused.items())},
            "strangers": self.credentials.strangers,
            "diagnostics": self._diagnostics(),
            "happened": dict(sorted(self.driver.traced.items())),
        }

    def _others(self) -> dict[str, str]:
        """The other LBs of the ring by name, and what is believed of each."""
        beliefs = self.driver.beliefs
        said = dict.fromkeys(beliefs.others, "up") | dict.fromkeys(beliefs.down, "doubted")
        said |= dict.fromkeys(beliefs.given_up, "down")
        return {self.driver.member_name(member): word for member, word in said.items()}

    def trace(self) -> list[dict[str, Any]]:
        """The JSON of /v1/trace, oldest first."""
        return [
            {
                "at": line.at.isoformat(timespec="milliseconds"),
                "what": line.trace.what,
                "vip": line.trace.vip,
                "slots": line.trace.slots,
                "detail": line.trace.detail,
            }
            for line in self.driver.trace
        ]
