"""The first look at a command line: an agent whose options are plain starts without the parser for people.

Why: that parser (typer, with all commands and their helps) takes a fifth of a second of a processor, which an agent
that comes back after a crash has better use for. Decided here: what is plain, namely `agent` and then options of its
own, each with a value. Whatever else there is (help, another command, a mistake) goes to ``main``, which knows what to
say; so nothing is refused here, and there is one place for each sentence.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Final

_FLAG: Final = "detach_on_exit"
"""The one option without a value."""

BAD_INPUT: Final = 2
LACKING: Final = 1


def plain_options(arguments: Sequence[str]) -> dict[str, str] | None:
    """Settings by field name, as ``read_settings`` takes them; None: not for us."""
    from lbpod.agent.settings import Settings

    names = {f"--{each.name.replace('_', '-')}": each.name for each in fields(Settings)}
    found: dict[str, str] = {}
    rest = iter(arguments[1:])
    for word in rest:
        option, equals, value = word.partition("=")
        name = names.get(option)
        if name is None or (name == _FLAG and equals):
            return None
        if name == _FLAG:
            value = "yes"
        elif not equals:
            value = next(rest, "-")
            if value.startswith("-"):
                return None
        found[name] = value
    return found


def run(options: Mapping[str, str | None]) -> int:
    """An agent until it ends. The exit status: 0, or with one sentence on standard error 2 for a setting that cannot
    be, 1 for a machine that lacks something, 70 for a mistake of our own."""
    from lbpod.agent.imports import import_agent

    import_agent()
    from lbpod.agent.agent import StartError
    from lbpod.agent.broken import BROKEN, BrokenError
    from lbpod.agent.run import run_agent
    from lbpod.agent.settings import SettingsError, read_settings

    try:
        run_agent(read_settings(options, os.environ))
    except SettingsError as error:
        return _fail(error, BAD_INPUT)
    except StartError as error:
        return _fail(error, LACKING)
    except BrokenError as error:
        return _fail(error, BROKEN)
    return 0


def _fail(error: Exception, status: int) -> int:
    sys.stderr.write(f"holdfast: {error}\n")
    return status


def main() -> None:
    """The entry point of `holdfast` and of `python -m lbpod.cli`."""
    if sys.argv[1:2] == ["agent"]:
        options = plain_options(sys.argv[1:])
        if options is not None:
            sys.exit(run(options))
    from lbpod.cli.main import main as whole

    whole()
