"""Which failures are our own mistake, and so end the agent: an invariant of ours that does not hold, wherever it shows.

Why a file: asyncio and aiohttp log what a callback, a task or a request handler raises, and go on. With a broken
invariant nobody may go on: what the agent believes is not what is so. It stops with a sentence, pinned maps keep
forwarding, and whoever starts it again finds them. (STYLE: errors, in three families.)

What the world does never ends the agent: a failing connection, also where asyncio itself stumbles over it. So an error
counts as ours only if it came through code of ours and is not one of those that the world causes.
"""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Final

import aiohttp

_OURS: Final = str(Path(__file__).parent.parent) + "/"
_OF_THE_WORLD: Final = (OSError, TimeoutError, aiohttp.ClientError)


def raise_what_failed(task: asyncio.Task[None]) -> None:
    """For tasks that nobody waits for: the loop hears of a failure at once, not when the task is collected."""
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


BROKEN: Final = 70
"""The exit status: EX_SOFTWARE of sysexits.h."""


class BrokenError(Exception):
    """The agent has stopped because of a mistake of its own. str(): one sentence."""


def is_ours(error: BaseException | None) -> bool:
    """True where a callback or a task of ours has failed as none may."""
    if not isinstance(error, Exception) or isinstance(error, _OF_THE_WORLD):
        return False
    at: TracebackType | None = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename.startswith(_OURS):
            return True
        at = at.tb_next
    return False


def sentence_of(error: BaseException) -> str:
    """What people read."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"a mistake of the agent's own has stopped it ({said}); forwarding goes on, start it again"
