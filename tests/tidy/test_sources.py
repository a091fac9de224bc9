"""The readers behind the laws, tried on text whose answer is plain: a law that sees nothing is worse than no law."""

from pathlib import Path

import pytest

from tests.tidy import sources

C_TEXT = """\
// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
#define HF_SLOTS 65536 /* one table */
#define HF_SHIFT (1U << 4)
#define HF_BYTES (HF_SLOTS * 8ULL) // eight a slot
#define HF_SAY(x) do { } while (0)

struct hf_thing {
	int a;
};

static __always_inline int
one(int a, int b)
{
	if (a) {
		return b;
	}
	return 0;
}

SEC("xdp")
int two(struct xdp_md *ctx) {
	return 1;
}
"""

PYTHON_TEXT = """\
import os.path
from asyncio import sleep


def outer() -> None:
    import socket

    for x in {1, 2}:
        hash(x)
    [y for y in set("ab")]
    [y for y in sorted({1})]
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of one C header and one module."""
    (tmp_path / "some.h").write_text(C_TEXT)
    (tmp_path / "some.py").write_text(PYTHON_TEXT)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def test_c_functions_are_measured_from_brace_to_brace(files: Path) -> None:
    assert [("one", 6), ("two", 3)] == list(sources.c_functions(files / "some.h"))


def test_c_limits_are_evaluated(files: Path) -> None:
    assert {"SLOTS": 65536, "SHIFT": 16, "BYTES": 524288} == sources.c_limits(files / "some.h")


def test_imports_are_seen_wherever_they_stand(files: Path) -> None:
    assert {"os", "asyncio", "socket"} == sources.imported_roots(files / "some.py")


def test_unsorted_sets_and_the_wrong_hash_are_seen(files: Path) -> None:
    assert ["some.py:8", "some.py:10"] == sources.walked_sets(files / "some.py")
    assert ["some.py:9"] == sources.calls_of(files / "some.py", "hash")


def test_functions_are_measured(files: Path) -> None:
    assert [("outer", 7)] == list(sources.python_functions(files / "some.py"))


def test_a_readme_is_read_outside_its_code_blocks(files: Path) -> None:
    readme = files / "README.md"
    readme.write_text("`some.py` and `gone.c`, `sub/`; not `a b.py`, nor `*.h`\n```\n`other.py`\n```\n")
    assert ["some.py", "gone.c", "sub/"] == sources.named_files(readme)
    assert [True, False, False] == [sources.leads_somewhere(files, named) for named in sources.named_files(readme)]
