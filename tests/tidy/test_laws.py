"""The laws of the house that no linter knows, as tests.

A rule that is only written down is forgotten by the third week; each of these costs a fraction of a second. What ruff,
mypy and the import contracts (pyproject.toml) can say is said there. Size limits are about reading: what does not fit
in a head gets split, in C as in Python.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tidy import sources
from tests.tidy.sources import ROOT

FUNCTION_LINES_MAX = 69
FILE_LINES_MAX = 699
DOCSTRING_WORDS_MIN = 12

CORE_IMPORTS_ALLOWED = {
    # third-party: arrays, the shared hash, schemas
    *("numpy", "mmh3", "msgspec"),
    # the standard library's pure part
    *(
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "ipaddress",
    ),
    *("itertools", "math", "struct", "types", "typing"),
    "lbpod",
}

PYTHON = sources.tracked("*.py")
C = sources.tracked("*.c", "*.h")
READMES = sources.tracked("*README.md")
LIMITS_C = ROOT / "lbpod/bpf/limits.h"


def test_operator_is_a_plain_folder() -> None:
    """An __init__.py in operator/ would shadow the standard library for whatever runs from the root."""
    assert not (ROOT / "operator/__init__.py").exists()
    where = subprocess.run(
        [sys.executable, "-c", "import operator; print(operator.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(json.__file__).parent.parent == Path(where.strip()).parent
    assert importlib.import_module("operator").add(20, 22) == 42


@pytest.mark.parametrize("path", PYTHON + C, ids=sources.name)
def test_files_fit_in_a_head(path: Path) -> None:
    lines_count = len(path.read_text().splitlines())
    assert lines_count <= FILE_LINES_MAX, f"{sources.name(path)} has {lines_count} lines; split it by what it decides"


@pytest.mark.parametrize("path", PYTHON + C, ids=sources.name)
def test_functions_fit_on_a_screen(path: Path) -> None:
    functions = sources.python_functions(path) if path.suffix == ".py" else sources.c_functions(path)
    assert [] == [f"{name}: {count} lines" for name, count in functions if count > FUNCTION_LINES_MAX]


@pytest.mark.parametrize("path", PYTHON, ids=sources.name)
def test_modules_open_with_why(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(docstring.split()) >= DOCSTRING_WORDS_MIN, (
        "say why this module exists, what it decides and what it leaves"
    )


@pytest.mark.parametrize("path", sources.tracked("lbpod/core/*.py"), ids=sources.name)
def test_core_imports_come_from_the_allow_list(path: Path) -> None:
    assert [] == sorted(sources.imported_roots(path) - CORE_IMPORTS_ALLOWED)


@pytest.mark.parametrize("path", sources.tracked("lbpod/*.py", "operator/*.py"), ids=sources.name)
def test_the_package_never_imports_scapy(path: Path) -> None:
    assert "scapy" not in sources.imported_roots(path)


@pytest.mark.parametrize("path", sources.tracked("lbpod/*.py", "operator/*.py"), ids=sources.name)
def test_sets_are_sorted_before_they_are_walked(path: Path) -> None:
    """Only what the syntax shows: a set display, comprehension or `set(...)` call as what a loop walks."""
    assert [] == sources.walked_sets(path)


@pytest.mark.parametrize("path", sources.tracked("lbpod/*.py", "operator/*.py"), ids=sources.name)
def test_nothing_uses_the_hash_that_changes_with_each_process(path: Path) -> None:
    assert [] == sources.calls_of(path, "hash")


@pytest.mark.parametrize("path", [p for p in PYTHON + C if p != Path(__file__)], ids=sources.name)
def test_nothing_is_left_for_later(path: Path) -> None:
    found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b.*", path.read_text())
    assert [] == found, "an issue is the place for what is left to do"


@pytest.mark.parametrize("path", C, ids=sources.name)
def test_c_states_its_licence(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(r"(?://|/\*) SPDX-License-Identifier: \(?GPL-2\.0-only OR BSD-2-Clause\)?(?: \*/)?", first)


def test_limits_are_equal_in_c_and_python() -> None:
    """`#define HF_X n` in C and `X = n` in Python are one limit; a name in both must have one value."""
    in_c = sources.c_limits(LIMITS_C)
    module = importlib.import_module("lbpod.core.limits")
    in_python = {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}
    shared = sorted(in_c.keys() & in_python.keys())
    assert shared, f"no name is in both: C has {sorted(in_c)}, Python has {sorted(in_python)}"
    assert {name: in_python[name] for name in shared} == {name: in_c[name] for name in shared}


def test_nothing_names_the_machine_it_was_written_on() -> None:
    """Paths of one machine mean nothing on the next. (One-letter classes keep the pattern from finding itself.)"""
    workplace = re.compile(r"/[w]ork/|/[t]mp/plan|/[h]ome/[a-z]|/[r]oot/")
    found = [
        f"{sources.name(path)}: {line.strip()}"
        for path in sources.tracked("*")
        if path.suffix not in {".pcap", ".png", ".o"}
        for line in path.read_text(errors="replace").splitlines()
        if workplace.search(line)
    ]
    assert [] == found


@pytest.mark.parametrize("path", READMES, ids=sources.name)
def test_readmes_name_only_files_that_exist(path: Path) -> None:
    """A README maps its folder: `name.ext` or `folder/` in backticks must exist, seen from there or from the root."""
    assert [] == [name for name in sources.named_files(path) if not sources.leads_somewhere(path.parent, name)]


def test_continuous_integration_runs_what_the_readme_tells_a_newcomer_to_run() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    told = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    tests = [line for line in told if "test" in line]
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert ["make test"] == tests
    assert f"exec {tests[0]} </dev/null" == commands[-1]
    assert {"set", "cd", "export", "exec"} == {line.split()[0] for line in commands}, "nothing else is run"


def test_each_dependency_states_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    reasons = {m["name"]: m["reason"] for m in re.finditer(r'"(?P<name>[^"\n]+)",? +# (?P<reason>.+)', text)}
    assert [] == [name for name in wanted if len(reasons.get(name, "").split()) < 3]
