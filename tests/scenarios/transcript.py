"""The file format of scenarios: commands, each with the exact output expected under it.

A block is a command, indented lines that belong to it, a line of dashes, and the expected output up to an empty line.
Without dashes the command must print nothing. ``---- calm`` instead of ``----``: this output depends on which
operations fail, so it is compared only in the run without faults. Everything else in the file (comments, empty lines)
is kept as it is when the file is written anew.
"""

import textwrap
from dataclasses import dataclass
from typing import Final

RULE: Final = "----"
CALM: Final = "---- calm"


@dataclass(slots=True)
class Block:
    """One command. line: of the command in its file, from 1."""

    line: int
    command: str
    more: str
    """The indented lines, without their indentation."""
    calm: bool
    expected: str

    def __str__(self) -> str:
        more = [textwrap.indent(self.more, "  ")] if self.more else []
        output = [CALM if self.calm else RULE, self.expected] if self.calm or self.expected else []
        return "\n".join([self.command, *more, *output])


def parse(text: str) -> list[Block | str]:
    """Blocks, and what stands between them, in order. Joined by newlines they are the file again."""
    items: list[Block | str] = []
    lines = text.rstrip("\n").split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip() or line.startswith("#"):
            items.append(line)
            at += 1
            continue
        assert not line.startswith((" ", RULE)), f"line {at + 1}: a block begins with its command: {line!r}"
        start, at = at, at + 1
        more: list[str] = []
        while at < len(lines) and lines[at].startswith(" "):
            more.append(lines[at])
            at += 1
        expected: list[str] = []
        calm = False
        if at < len(lines) and lines[at].startswith(RULE):
            assert lines[at] in {RULE, CALM}, f"line {at + 1}: a rule is {RULE!r} or {CALM!r}"
            calm = lines[at] == CALM
            at += 1
            while at < len(lines) and lines[at].strip():
                expected.append(lines[at])
                at += 1
        items.append(Block(start + 1, line, textwrap.dedent("\n".join(more)), calm, "\n".join(expected)))
    return items


def render(items: list[Block | str]) -> str:
    """The file's text."""
    return "\n".join(str(item) for item in items) + "\n"
