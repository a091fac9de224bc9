"""What the checking client believes: is an answer right, and whose fault is a failure? No I/O, no clock.

Three verdicts, because two would hide something:

- ``BROKEN``: the flow failed although the backend that served it was alive (or nobody went away at all). This is the
  number the project promises to keep at 0.
- ``BACKEND_GONE``: the backend that served it had been removed; nothing could have saved the flow.
- ``UNATTRIBUTED``: it failed before any backend had named itself, *and* some backend had just been removed: nobody can
  tell. Counted apart instead of being excused or blamed.

A failure is judged a little after it happened (``CHECK_GRACE_NS``), for the parent's word "NAME is gone" and the RST of
its last packet may overtake each other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from lbpod.lab.limits import CHECK_ANSWER_BYTES_MAX, CHECK_BACKEND_NAME_MAX, CHECK_GRACE_NS

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
    """Monotonic."""
    opened_ns: int
    """When the flow was begun."""
    reason: Reason
    backend: str | None
    """Who had served the flow; ``None``: it never got an answer."""
    local_port: int
    answers: int
    """Answers the flow had got before."""
    detail: str


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


class Judge:
    """Knows which backends are gone, and gives each failure its verdict once it is old enough."""

    def __init__(self, blame_window_ns: int) -> None:
        self._blame_window_ns = blame_window_ns
        """How long after a removal a failure without a backend may be due to it."""
        self._gone: dict[str, int] = {}  # name -> when we were told
        self._last_gone_ns: int | None = None
        self._haunting: set[str] = set()  # gone, and new flows may still be sent there
        self._leaving: set[str] = set()
        self._last_left_ns: int | None = None
        self._waiting: deque[Failure] = deque()  # in order of at_ns

    def gone(self, name: str, now_ns: int) -> None:
        self._gone[name] = now_ns
        self._last_gone_ns = now_ns

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

    def haunts(self, name: str) -> None:
        """It is gone, and new flows are sent to it until ``forgotten``: nobody has told all load balancers."""
        self._haunting.add(name)

    def forgotten(self, name: str, now_ns: int) -> None:
        """From now on no new flow is sent to it."""
        self._haunting.discard(name)
        self._last_gone_ns = now_ns

    def alive(self, name: str) -> None:
        self._gone.pop(name, None)

    def failed(self, failure: Failure) -> None:
        self._waiting.append(failure)

    def verdicts(self, now_ns: int, *, final: bool = False) -> Iterator[tuple[Verdict, Failure]]:
        """Failures whose time has come (all of them, if ``final``)."""
        while self._waiting and (final or now_ns - self._waiting[0].at_ns >= CHECK_GRACE_NS):
            failure = self._waiting.popleft()
            yield self._verdict(failure), failure

    def _verdict(self, failure: Failure) -> Verdict:
        if failure.backend is not None:
            return Verdict.BACKEND_GONE if failure.backend in self._gone else Verdict.BROKEN
        if self._haunting:
            return Verdict.UNATTRIBUTED
        if failure.reason in (Reason.RESET, Reason.CLOSED) and self._may_have_left(failure):
            return Verdict.UNATTRIBUTED
        if self._last_gone_ns is not None and failure.at_ns - self._last_gone_ns <= self._blame_window_ns:
            return Verdict.UNATTRIBUTED
        return Verdict.BROKEN

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
    short_skipped: int = 0
    """Not even started, because too many were in flight."""
    lost: int = 0
    """UDP: datagrams without an answer that did not break their flow."""
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    reasons: dict[Verdict, Counter[Reason]] = field(default_factory=lambda: {one: Counter() for one in Verdict})
    backends: Counter[str] = field(default_factory=Counter)
    """Long-lived flows open now, by backend."""

    def judged(self, verdict: Verdict, failure: Failure) -> None:
        self.verdicts[verdict] += 1
        self.reasons[verdict][failure.reason] += 1

    def as_dict(self) -> dict[str, object]:
        return {
            "connections": self.connections,
            "long_lived": self.long_lived,
            "requests": self.requests,
            "short_done": self.short_done,
            "short_in_flight": self.short_in_flight,
            "short_skipped": self.short_skipped,
            "lost": self.lost,
            **{str(one): self.verdicts[one] for one in Verdict},
            "by_reason": {
                str(one): {str(reason): count for reason, count in sorted(self.reasons[one].items())}
                for one in Verdict
                if self.reasons[one]
            },
            "backends": {name: self.backends[name] for name in sorted(self.backends) if self.backends[name]},
        }
