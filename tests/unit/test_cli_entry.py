"""What a start goes past: options that are plain reach the agent without the parser for people, and mean the same."""

import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Final

import pytest
import typer.main

import lbpod
from lbpod.agent.settings import Settings
from lbpod.cli.entry import plain_options
from lbpod.cli.main import app

ROOT: Final = Path(__file__).parents[2]
HEAVY: Final = ("cryptography", "prometheus_client", "pyroute2", "redis", "rich", "typer", "importlib.metadata")


def test_each_option_of_the_agent_is_a_setting_of_that_name() -> None:
    command = typer.main.get_command(app).commands["agent"]  # type: ignore[attr-defined]
    options = {option.name: option.opts for option in command.params}
    assert {each.name: [f"--{each.name.replace('_', '-')}"] for each in fields(Settings)} == options
    assert ["detach_on_exit"] == [option.name for option in command.params if option.is_flag]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--node n1 --on-term=stay", {"node": "n1", "on_term": "stay"}),
        ("--detach-on-exit --node n1", {"node": "n1", "detach_on_exit": "yes"}),
        ("--node n1 --node n2", {"node": "n2"}),
        ("--node=", {"node": ""}),
        ("--help", None),
        ("--nodes n1", None),
        ("n1", None),
        ("--node", None),
        ("--node --listen", None),
        ("--detach-on-exit=yes", None),
        ("--no-detach-on-exit", None),
    ],
)
def test_what_is_plain_is_read_and_all_else_is_left_to_the_parser(words: str, expected: dict[str, str] | None) -> None:
    assert expected == plain_options(["agent", *words.split()])


def test_an_agent_imports_nothing_that_its_start_does_not_need() -> None:
    program = (
        "import os, sys; before = dict(os.environ)\n"
        "from lbpod.agent.imports import import_agent; import_agent()\n"
        "import gc; assert gc.isenabled()\n"
        "os.environ.pop('OPENBLAS_NUM_THREADS'); before.pop('OPENBLAS_NUM_THREADS', None)\n"
        "assert before == dict(os.environ), 'what was hidden is back'\n"
        "assert 'lbpod.agent.run' in sys.modules\n"
        f"print(*sorted(set(sys.modules) & set({HEAVY!r})))\n"
        "import rich\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SSL_CERT_FILE": "/somewhere"}
    environment.pop("SSL_CERT_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (0, "\n", "") == (done.returncode, done.stdout, done.stderr)


def test_the_package_says_which_version_it_is() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == lbpod.__version__
