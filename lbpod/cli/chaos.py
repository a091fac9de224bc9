"""`holdfast chaos`: options, a look at the machine, and the run.

Apart from ``main`` so that the command line of a pod does not know the lab, as with the demo.
"""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from lbpod.lab.chaos.options import Options

_EVERY = "Seconds between two; 0: never."


def chaos(
    minutes: Annotated[float, typer.Option(min=0.1, max=1_440, help="Of changes; quiet and calm come on top.")] = 10,
    long_count: Annotated[int, typer.Option("--long", min=1, max=20_000, help="Long-lived connections.")] = 5_000,
    interval_ms: Annotated[int, typer.Option(min=100, help="Between two requests of one of them.")] = 5_000,
    probes: Annotated[int, typer.Option(min=1, max=1_000, help="More of them, that ask often.")] = 30,
    short_rate: Annotated[int, typer.Option(min=0, max=5_000, help="Short connections opened a second.")] = 200,
    wrk: Annotated[int, typer.Option(min=0, max=1_000, help="Connections of wrk, fetching 1 MiB each 2 s.")] = 4,
    timeout_ms: Annotated[int, typer.Option(min=500, help="A later answer is none.")] = 10_000,
    idle_seconds: Annotated[int, typer.Option(min=2, help="The VIP's idle timeout.")] = 30,
    quiet_seconds: Annotated[int, typer.Option(min=1, max=600, help="Before the changes begin.")] = 10,
    lbs: Annotated[int, typer.Option(min=3, max=16, help="Load balancers.")] = 4,
    hosts: Annotated[int, typer.Option(min=1, max=16, help="Nodes with backends.")] = 3,
    backends: Annotated[int, typer.Option(min=4, max=200, help="Backends.")] = 12,
    changes: Annotated[float, typer.Option(min=0, max=600, help="Backend changes a minute.")] = 80,
    removals: Annotated[float, typer.Option(min=0, max=60, help="Of them, drained backends removed.")] = 4,
    crashes: Annotated[float, typer.Option(min=0, max=60, help="Of them, backends that die.")] = 1,
    loss_every: Annotated[float, typer.Option(min=0, help=f"An LB is lost, another joins. {_EVERY}")] = 20,
    leave_every: Annotated[float, typer.Option(min=0, help=f"An LB leaves in order. {_EVERY}")] = 60,
    double_every: Annotated[int, typer.Option(min=0, help="So many losses from one of two LBs to the next.")] = 0,
    agent_kill_every: Annotated[float, typer.Option(min=0, help=f"kill -9 for an agent. {_EVERY}")] = 7,
    controller_kill_every: Annotated[float, typer.Option(min=0, help=f"The same for the controller. {_EVERY}")] = 30,
    reshuffle_every: Annotated[float, typer.Option(min=0, help=f"ECMP reshuffle. {_EVERY}")] = 1.5,
    link_cut_every: Annotated[float, typer.Option(min=0, help=f"Two LBs lose sight of each other. {_EVERY}")] = 0,
    router_ms: Annotated[int, typer.Option(min=0, max=60_000, help="How long the router sends into a lost LB.")] = 300,
    seed: Annotated[int, typer.Option(help="Of what happens when, and to whom.")] = 1,
    run: Annotated[list[str] | None, typer.Option(help="holdfast, hash_only or local_table; again for more.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report with plots to this file.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the programs' logs in this folder.")] = None,
) -> None:
    """Keep real connections open while backends and load balancers change, die and come. Needs root."""
    from lbpod.lab.chaos.options import Options

    _check(run or [], json_file, html_file)
    if idle_seconds * 1_000 < 2 * interval_ms:
        _fail(f"--idle-seconds {idle_seconds}: twice the {interval_ms} ms between two requests, at least", 2)
    options = Options(
        minutes=minutes,
        lbs=lbs,
        hosts=hosts,
        backends=backends,
        long_count=long_count,
        interval_ms=interval_ms,
        probes=probes,
        short_rate=short_rate,
        wrk_connections=wrk,
        timeout_ms=timeout_ms,
        quiet_seconds=quiet_seconds,
        idle_seconds=idle_seconds,
        changes_per_minute=changes,
        removals_per_minute=removals,
        crashes_per_minute=crashes,
        loss_seconds=loss_every,
        leave_seconds=leave_every,
        double_every=double_every,
        agent_kill_seconds=agent_kill_every,
        controller_kill_seconds=controller_kill_every,
        reshuffle_seconds=reshuffle_every,
        link_cut_seconds=link_cut_every,
        router_ms=router_ms,
        seed=seed,
    )
    raise typer.Exit(_show(run or ["holdfast"], options, json_file, html_file, logs))


def _check(runs: list[str], json_file: Path | None, html_file: Path | None) -> None:
    """What can be said before anything is started."""
    from lbpod.lab.cluster import TITLES

    unknown = sorted(set(runs) - set(TITLES))
    if unknown:
        _fail(f"--run {unknown[0]} is not known; use {', '.join(TITLES)}", 2)
    for name, file in (("--json", json_file), ("--html", html_file)):
        if file is not None and not file.absolute().parent.is_dir():
            _fail(f"{name} {file}: there is no folder {file.absolute().parent}", 2)
    if html_file is not None and importlib.util.find_spec("matplotlib") is None:
        _fail("--html needs matplotlib for its plots; install holdfast[lab]", 1)
    if os.geteuid() != 0:
        _fail("chaos makes network namespaces and loads BPF programs; run it as root", 1)


def _show(
    runs: list[str], options: "Options", json_file: Path | None, html_file: Path | None, logs: Path | None
) -> int:
    from lbpod.lab.chaos.show import EXIT_BROKEN, Files, show
    from lbpod.lab.errors import LabError

    command = shlex.join(["holdfast", *sys.argv[1:]])
    try:
        status = show(runs, options, Files(json_file, html_file, logs), command, Console())
    except LabError as error:
        _fail(str(error), 1)
    if status == EXIT_BROKEN:
        typer.echo("holdfast: connections broke whose backend lived, or some are not accounted for", err=True)
    return status


def _fail(sentence: str, status: int) -> NoReturn:
    typer.echo(f"holdfast: {sentence}", err=True)
    raise typer.Exit(status)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(chaos)
