"""What the checking client believes: is an answer right, and whose fault is a failure? No I/O, no clock.

Three verdicts, because two would hide something:

- ``BROKEN``: the flow failed although the backend that served it was alive (or nobody went away at all). This is the
  number the project promises to keep at 0.
- ``BACKEND_GONE``: the backend that served it had been removed *when it failed*; nothing could have saved the flow.
- ``UNATTRIBUTED``: it failed before any backend had named itself, *and* it may have been sent to one that had just been
  removed: nobody can tell. Counted apart instead of being excused or blamed.

What counts is when a flow failed, not when the client noticed: a reset is stamped as it arrives, which may be a whole
interval before the next request meets it, and a question without an answer by when it was asked. So what broke first
and lost its backend afterwards is broken.

A flow without a backend can be the doing of one that went without a word only if it was begun before that one was
forgotten. If it was begun after that one had gone, it can only have waited in vain for its connection: who is not there
completes no handshake and resets nothing. Dropped: whatever failed within two time-outs of a removal. With a crash a
minute that was a third of the time, and took any reason.

A failure is judged a little after it was noticed (``CHECK_GRACE_NS``), for the parent's word "NAME is gone" and the RST
of its last packet may overtake each other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import Final

from lbpod.lab.limits import (
    CHECK_ANSWER_BYTES_MAX,
    CHECK_BACKEND_NAME_MAX,
    CHECK_GRACE_NS,
    CHECK_LOST_WITH_NS,
    SECOND_NS,
)

_END_OF_HEADERS: Final = b"\r\n\r\n"
_STATUS: Final = b"HTTP/1.1 200 OK\r\n"
_LENGTH: Final = b"content-length:"


class Reason(StrEnum):
    """How a flow failed."""

    RESET = "reset"
    CLOSED = "closed"
    """The other side closed (FIN) although nobody asked it to."""
    TIMEOUT = "timeout"
    OTHER_BACKEND = "other_backend"
    WRONG_BYTES = "wrong_bytes"
    REFUSED = "refused"
    """The connection was refused; for UDP, port unreachable."""
    CONNECT_TIMEOUT = "connect_timeout"
    NETWORK = "network"
    """Another error of the network: host unreachable and the like."""


class Verdict(StrEnum):
    BROKEN = "broken"
    BACKEND_GONE = "broken_backend_gone"
    UNATTRIBUTED = "broken_unattributed"


class FlowError(Exception):
    """A flow has failed, and how."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Failure:
    at_ns: int
    """When the client noticed. Monotonic, as all of these: opened_ns <= asked_ns <= at_ns, failed_ns <= at_ns."""
    opened_ns: int
    """When the flow was begun."""
    asked_ns: int
    """When its last question was asked; opened_ns: it never asked."""
    failed_ns: int
    """When the reset, the close or the wrong answer arrived; of a time-out: at_ns."""
    connected: bool
    """It had been opened, and is counted as a connection."""
    reason: Reason
    backend: str | None
    """Who had served the flow; ``None``: it never got an answer."""
    local_port: int
    answers: int
    """Answers the flow had got before."""
    detail: str
    gone_ns: int | None = None
    """When its backend went, as far as the judge has been told."""

    def may_be_due_to(self, gone_ns: int) -> bool:
        """True unless it happened before something that went at this time can have had to do with it."""
        if self.reason in (Reason.TIMEOUT, Reason.CONNECT_TIMEOUT):
            return self.asked_ns >= gone_ns - CHECK_LOST_WITH_NS
        return self.failed_ns >= gone_ns - CHECK_GRACE_NS


class Incomplete(Enum):
    """The answer has not arrived whole."""

    MORE = "more"


def read_http_answer(data: bytes, token: str) -> str | Incomplete:
    """The backend's name, if ``data`` is exactly one whole right answer to ``token``.

    Raises ``FlowError(WRONG_BYTES)`` as soon as the bytes can no longer become the right answer.
    """
    head, found, body = data.partition(_END_OF_HEADERS)
    if not found:
        if len(data) > CHECK_ANSWER_BYTES_MAX or data[: len(_STATUS)] != _STATUS[: len(data)]:
            raise FlowError(Reason.WRONG_BYTES, f"no answer begins like this: {data[:80]!r}")
        return Incomplete.MORE
    if not head.startswith(_STATUS):
        raise FlowError(Reason.WRONG_BYTES, f"status line {head[:80]!r}")
    lengths = [line.partition(b":")[2].strip() for line in head.split(b"\r\n") if line.lower().startswith(_LENGTH)]
    if len(lengths) != 1 or not lengths[0].isdigit() or int(lengths[0]) > CHECK_ANSWER_BYTES_MAX:
        raise FlowError(Reason.WRONG_BYTES, f"content length {lengths!r}")
    length = int(lengths[0])
    if len(body) < length:
        return Incomplete.MORE
    if len(body) > length:
        raise FlowError(Reason.WRONG_BYTES, f"{len(body) - length} bytes after the answer: {body[length:][:80]!r}")
    return read_echo(body, f"{token}\n".encode())


def read_echo(answer: bytes, sent: bytes) -> str:
    """The name in ``<name> <sent>``; ``FlowError(WRONG_BYTES)`` for anything else."""
    name, _, rest = answer.partition(b" ")
    if rest != sent or not 0 < len(name) <= CHECK_BACKEND_NAME_MAX or not name.isascii():
        raise FlowError(Reason.WRONG_BYTES, f"asked {sent!r}, got {answer[:120]!r}")
    return name.decode()


@dataclass
class Departure:
    """A backend that went without a word. Invariant: gone_ns <= went_ns, and forgotten_ns is None or >= gone_ns."""

    gone_ns: int
    """From here on it may be gone."""
    went_ns: int
    """From here on it is: the parent says ``haunts`` once it has removed it."""
    forgotten_ns: int | None
    """From here on no new flow is sent to it; ``None``: flows still are."""

    def may_have_lost(self, failure: Failure, unheard: Reason) -> bool:
        """failure: of a flow that nobody has answered."""
        if not failure.may_be_due_to(self.gone_ns):
            return False
        if self.forgotten_ns is not None and failure.opened_ns > self.forgotten_ns + CHECK_GRACE_NS:
            return False
        return failure.reason is unheard or failure.opened_ns <= self.went_ns + CHECK_GRACE_NS


class Judge:
    """Knows which backends are gone, and gives each failure its verdict once it is old enough."""

    def __init__(self, unheard: Reason = Reason.CONNECT_TIMEOUT) -> None:
        self._unheard = unheard
        """How a flow fails that is begun with a backend that is not there. (UDP has no handshake: TIMEOUT.)"""
        self._gone: dict[str, int] = {}  # name -> when we were told
        self._departed: dict[str, Departure] = {}  # by name; its keys are in _gone
        self._leaving: set[str] = set()
        self._last_left_ns: int | None = None
        self._waiting: deque[Failure] = deque()  # in order of at_ns

    def gone(self, name: str, now_ns: int) -> None:
        """It is removed at this moment, and no new flow is sent to it, unless ``haunts`` is said."""
        self._gone[name] = now_ns
        self._departed[name] = Departure(now_ns, now_ns, now_ns)

    def leaves(self, name: str, now_ns: int) -> None:
        """It has drained, the config is written without it, and it serves until ``left``. Whoever it serves loses it.
        Of those that nobody has answered yet, only those may be its doing that were begun before it was gone, and are
        reset: it answers, but for the few that reach it just before the config without it comes into force."""
        self._gone[name] = now_ns
        self._leaving.add(name)

    def left(self, name: str, now_ns: int) -> None:
        """Nobody forwards to it any more."""
        self._leaving.discard(name)
        self._last_left_ns = now_ns

    def haunts(self, name: str, now_ns: int) -> None:
        """It has been removed by now, and new flows are sent to it until ``forgotten``: nobody has told all load
        balancers."""
        gone_ns = self._gone.setdefault(name, now_ns)
        self._departed[name] = Departure(gone_ns, now_ns, None)

    def forgotten(self, name: str, now_ns: int) -> None:
        """From now on no new flow is sent to it."""
        departure = self._departed.get(name)
        if departure is not None:
            departure.forgotten_ns = now_ns

    def alive(self, name: str) -> None:
        """One of this name serves: what an earlier one did or suffered excuses nothing any more."""
        self._gone.pop(name, None)
        self._departed.pop(name, None)
        self._leaving.discard(name)

    def failed(self, failure: Failure) -> None:
        self._waiting.append(failure)

    def verdicts(self, now_ns: int, *, final: bool = False) -> Iterator[tuple[Verdict, Failure]]:
        """Failures whose time has come (all of them, if ``final``), with what is known of their backends."""
        while self._waiting and (final or now_ns - self._waiting[0].at_ns >= CHECK_GRACE_NS):
            failure = self._waiting.popleft()
            yield self._unanswered(failure) if failure.backend is None else self._answered(failure, failure.backend)

    def _answered(self, failure: Failure, backend: str) -> tuple[Verdict, Failure]:
        gone_ns = self._gone.get(backend)
        if gone_ns is None:
            return Verdict.BROKEN, failure
        if failure.may_be_due_to(gone_ns):
            return Verdict.BACKEND_GONE, replace(failure, gone_ns=gone_ns)
        began_ns = failure.asked_ns if failure.reason is Reason.TIMEOUT else failure.failed_ns
        told = f"{failure.detail}; {backend} went only {(gone_ns - began_ns) / SECOND_NS:.3f} s later"
        return Verdict.BROKEN, replace(failure, gone_ns=gone_ns, detail=told)

    def _unanswered(self, failure: Failure) -> tuple[Verdict, Failure]:
        if failure.reason in (Reason.RESET, Reason.CLOSED) and self._may_have_left(failure):
            return Verdict.UNATTRIBUTED, failure
        if any(one.may_have_lost(failure, self._unheard) for one in self._departed.values()):
            return Verdict.UNATTRIBUTED, failure
        return Verdict.BROKEN, failure

    def _may_have_left(self, failure: Failure) -> bool:
        """Judged by when the flow was begun, for a client that has no time learns of a reset seconds after it came."""
        last_ns = self._last_left_ns
        return bool(self._leaving) or (last_ns is not None and failure.opened_ns - last_ns <= CHECK_GRACE_NS)


class Histogram:
    """Durations in buckets 1/16 of their size wide: bounded memory, percentiles at most 6.25 % too high."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self._count = 0

    def add(self, duration_ns: int) -> None:
        shift = max(0, duration_ns.bit_length() - 5)
        self._buckets[(shift << 5) | (duration_ns >> shift)] += 1
        self._count += 1

    def clear(self) -> None:
        self._buckets.clear()
        self._count = 0

    def percentile(self, share: float) -> int:
        """Upper bound in ns of the bucket that holds this share (0 ... 1) of all durations; 0 if there are none."""
        seen = 0
        for key in sorted(self._buckets):
            seen += self._buckets[key]
            if seen >= share * self._count:
                return (((key & 31) + 1) << (key >> 5)) - 1
        return 0

    def summary(self) -> dict[str, int]:
        return {f"p{label}": self.percentile(share) for label, share in (("50", 0.5), ("90", 0.9), ("99", 0.99))} | {
            "max": self.percentile(1.0)
        }


@dataclass
class Tally:
    """What the checker has counted since its start."""

    connections: int = 0
    """Flows opened (TCP: established)."""
    requests: int = 0
    """Right answers."""
    long_lived: int = 0
    """Long-lived flows that are open now and have got an answer."""
    short_done: int = 0
    short_in_flight: int = 0
    """Started, and neither answered nor failed: some of them have yet to be opened."""
    short_open: int = 0
    """Of these, opened."""
    long_open: int = 0
    """Long-lived flows that are open now, whether or not they have got an answer."""
    short_skipped: int = 0
    """Not even started, because too many were in flight."""
    lost: int = 0
    """UDP: datagrams without an answer that did not break their flow."""
    failed_unopened: int = 0
    """Failures (of any verdict) of flows that could not even be opened, so they are no ``connections``."""
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    reasons: dict[Verdict, Counter[Reason]] = field(default_factory=lambda: {one: Counter() for one in Verdict})
    backends: Counter[str] = field(default_factory=Counter)
    """Long-lived flows open now, by backend."""

    def judged(self, verdict: Verdict, failure: Failure) -> None:
        self.verdicts[verdict] += 1
        self.reasons[verdict][failure.reason] += 1
        self.failed_unopened += not failure.connected

    def as_dict(self) -> dict[str, object]:
        return {
            "connections": self.connections,
            "long_lived": self.long_lived,
            "requests": self.requests,
            "short_done": self.short_done,
            "short_in_flight": self.short_in_flight,
            "short_open": self.short_open,
            "long_open": self.long_open,
            "short_skipped": self.short_skipped,
            "lost": self.lost,
            "failed_unopened": self.failed_unopened,
            **{str(one): self.verdicts[one] for one in Verdict},
            "by_reason": {
                str(one): {str(reason): count for reason, count in sorted(self.reasons[one].items())}
                for one in Verdict
                if self.reasons[one]
            },
            "backends": {name: self.backends[name] for name in sorted(self.backends) if self.backends[name]},
        }
