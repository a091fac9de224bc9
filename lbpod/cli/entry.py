"""The first look at a command line: an agent whose options are plain starts without the parser for people.

Why: that parser (typer, with all commands and their helps) takes a fifth of a second of a processor, which an agent
that comes back after a crash has better use for. Decided here: what is plain, namely `agent` and then options of its
own, each with a value. Whatever else there is (help, another command, a mistake) goes to ``main``, which knows what to
say; so nothing is refused here, and there is one place for each sentence.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Final

_FLAG: Final = "detach_on_exit"
"""The one option without a value."""


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


def main() -> None:
    """The entry point of `holdfast` and of `python -m lbpod.cli`."""
    if sys.argv[1:2] == ["agent"]:
        options = plain_options(sys.argv[1:])
        if options is not None:
            from lbpod.agent.__main__ import run

            sys.exit(run(options, "holdfast"))
    from lbpod.cli.main import main as whole

    whole()
