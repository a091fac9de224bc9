"""Ctrl-C, SIGTERM and SIGHUP around a lab: they must end the program *through* the lab's clean-up.

SIGINT already raises ``KeyboardInterrupt``. SIGTERM and SIGHUP would end the process on the spot, so while a lab is
open they raise ``SystemExit`` instead, but only where nobody else has set a handler. While the lab is being removed all
three wait: a second, impatient Ctrl-C must not stop the clean-up half way; it is delivered right after.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_DEFERRED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class ExitOnSignal:
    """Turns SIGTERM and SIGHUP into ``SystemExit`` between :meth:`install` and :meth:`remove` (main thread only)."""

    def __init__(self) -> None:
        self._installed: list[signal.Signals] = []

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)
                self._installed.append(number)

    def remove(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._installed:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)
        self._installed.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that end the program wait until the block is done; the first of them is then raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)

    before = {number: signal.getsignal(number) for number in _DEFERRED}
    for number in _DEFERRED:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if waiting:
            signal.raise_signal(waiting[0])
