"""How old is this question? Told on each side's own monotonic clock, with no clock that both would have to share.

Why it matters: a backup that agrees to a settle, or to forgetting, acts on it at once, and may only do so while what
the owner has looked at is fresh: the window in which *neither* has seen a flow has to be longer than idle + lease. A
question that lay in the socket of an agent that stood still, or came out of a cable that was cut, was given up long ago
by the one who asked; acted upon seconds later it broke connections. Wall clocks may show anything, so a deadline in the
body was dropped.

How: every answer of an agent says what its clock shows. The next question to it says what that clock should show by
now, which is an answer's way home behind. So the age found is never less than the true one; a slow answer makes the
next question look older than it is, once. Who has never had an answer says nothing, and is refused: that is one.
"""

from typing import Final

HEADER_CLOCK: Final = "Holdfast-Clock"
_DIGITS_MAX: Final = 20
_CLOCK_NS_MAX: Final = (1 << 63) - 1
"""Three hundred years after a boot. What shows more is no clock."""


def read_clock(text: str | None) -> int | None:
    """Nanoseconds as the other side wrote them, None where it did not."""
    if text is None or len(text) > _DIGITS_MAX or not text.isascii() or not text.isdecimal():
        return None
    return int(text)


class Clocks:
    """What the clocks of others show, by name. len <= nodes ever heard of."""

    def __init__(self) -> None:
        self._ahead_ns: dict[str, int] = {}

    def heard(self, name: str, shown_ns: int | None, now_ns: int) -> None:
        """An answer has come, and with it what the clock there shows; None: it says nothing about that."""
        if shown_ns is not None and shown_ns <= _CLOCK_NS_MAX:
            self._ahead_ns[name] = shown_ns - now_ns

    def there_ns(self, name: str, now_ns: int) -> int | None:
        """What the clock there shows by now, for the next question; None: there was no answer yet."""
        ahead_ns = self._ahead_ns.get(name)
        return None if ahead_ns is None else max(now_ns + ahead_ns, 0)

    def headers(self, name: str, now_ns: int) -> dict[str, str]:
        """The same as a header."""
        there_ns = self.there_ns(name, now_ns)
        return {} if there_ns is None else {HEADER_CLOCK: str(there_ns)}
