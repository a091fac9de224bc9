"""Every transcript of this folder, replayed: without faults, and by seed with a tenth of all map operations failing.

The README says how to read, write and replay one. ``HOLDFAST_REWRITE=1`` writes the expected outputs anew (from the
run without faults): the diff is the review. ``HOLDFAST_SEEDS=17,18`` replays other seeds than the usual ones.
"""

import difflib
import os
from pathlib import Path

import pytest

from tests.conftest import SOAK_FACTOR
from tests.scenarios.commands import Stage
from tests.scenarios.transcript import Block, parse, render

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.txt"))
REWRITE = os.environ.get("HOLDFAST_REWRITE") == "1"
SEEDS_COUNT = 2 if SOAK_FACTOR == 1 else 40


def seeds() -> list[int | None]:
    """None: nothing fails."""
    named = os.environ.get("HOLDFAST_SEEDS", "")
    drawn = [int(word) for word in named.split(",")] if named else list(range(1, SEEDS_COUNT + 1))
    return [None, *drawn]


def replay(path: Path, fault_seed: int | None) -> tuple[list[Block | str], list[str], Stage]:
    """The transcript as it comes out, where it differs, and the stage as it was left."""
    items = parse(path.read_text())
    stage, problems = Stage(fault_seed), list[str]()
    for item in items:
        if not isinstance(item, Block):
            continue
        try:
            printed = stage.run(item.command, item.more)
        except AssertionError as error:
            raise AssertionError(f"{where(path, item, fault_seed)}\n{item.command}\n{error}") from error
        compared = fault_seed is None or not item.calm
        if compared and printed != item.expected:
            diff = difflib.unified_diff(
                item.expected.split("\n"), printed.split("\n"), "expected", "printed", lineterm=""
            )
            problems.append("\n".join([where(path, item, fault_seed), item.command, *list(diff)[2:]]))
        item.expected = printed
    for node in stage.cluster.nodes.values():
        node.keeper.check_invariants()
    return items, problems, stage


def where(path: Path, block: Block, fault_seed: int | None) -> str:
    """The place, and the command that replays it."""
    setting = "" if fault_seed is None else f"HOLDFAST_SEEDS={fault_seed} "
    run = "calm" if fault_seed is None else f"seed{fault_seed}"
    return (
        f"tests/scenarios/{path.name}:{block.line} ({run}); replay with\n"
        f"  {setting}pytest 'tests/scenarios/test_scenarios.py::test_scenario[{run}-{path.stem}]'"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("fault_seed", seeds(), ids=lambda seed: "calm" if seed is None else f"seed{seed}")
def test_scenario(path: Path, fault_seed: int | None) -> None:
    items, problems, stage = replay(path, fault_seed)
    if REWRITE and fault_seed is None:
        path.write_text(render(items))
        problems = []
    assert stage.broken == [], "packets of live flows reached another pod"
    assert problems == [], "\n\n".join(problems)
    assert (fault_seed is not None) == (stage.cluster.faults_count > 0), (
        "faults come in runs with a seed, and only there"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    """A scenario nobody can say why it is there is one nobody will dare to change. And the parser loses nothing."""
    text = path.read_text()
    first = text.split("\n", 1)[0]
    assert first.startswith("# ")
    assert len(first.split()) >= 8
    assert text == render(parse(text))
