"""What all benches say in the same way: which machine it was, what a figure has to be and is, and where it is written.

A figure means something only beside the machine that it was measured on and what else that machine was doing, so both
stand at the head of every report; and a figure that was not measured is never called met or missed.
"""

import argparse
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from lbpod.datapath import libbpf

ROOT: Final = Path(__file__).parents[2]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure, and what it has to be. met: None where it was not measured."""

    what: str
    figure: str
    target: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """One or two words."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def machine() -> Figures:
    """Processor, kernel, compiler and versions, and the load at this moment."""
    compiler = subprocess.run(
        [ROOT / "tools/find-clang.sh"], capture_output=True, text=True, check=False
    ).stdout.strip()
    version = ""
    if compiler:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        version = said.splitlines()[0] if said else compiler
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "compiler": version or "none",
        "libbpf": libbpf.version(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "load": round(os.getloadavg()[0], 1),
    }


def processor() -> str:
    """Its name; the architecture where the kernel tells none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def head(title: str, command: str, named: Mapping[str, Any]) -> list[str]:
    """The first lines of a report in Markdown."""
    return [f"# {title}", "", f"Made by `{command}`, in one run:", "", *(f"- {key}: {named[key]}" for key in named)]


def table_of(goals: Sequence[Goal]) -> list[str]:
    """Targets as lines of Markdown."""
    lines = ["", "## Targets", "", "| figure | measured | target | |", "| --- | ---: | --- | --- |"]
    return lines + [f"| {one.what} | {one.figure} | {one.target} | {one.verdict} |" for one in goals]


def command_of(target: str, arguments: Sequence[str]) -> str:
    """How a run is repeated."""
    return f"make {target}" + (f' ARGS="{" ".join(arguments)}"' if arguments else "")


def add_files(parser: argparse.ArgumentParser) -> None:
    """The options that name files to write."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a report in Markdown")


def check_files(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Ends with status 2 where one cannot be written: before an hour of measuring, not after."""
    for path in filter(None, (asked.json, asked.report)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"{path} cannot be a file: it is a folder, or its folder is not there")
