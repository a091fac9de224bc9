"""`holdfast demo`: options, a look at the machine, and the show.

Apart from ``main`` so that the command line of a pod does not know the lab. Where the machine cannot move packets, the
first sentence says why, and the show is played in the simulator: a program of its own (``lbpod.lab.demo.__main__``).
"""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from lbpod.lab.demo.show import Options


def demo(
    seconds: Annotated[int, typer.Option(min=16, max=3_600, help="Length of each of the three runs.")] = 32,
    long_count: Annotated[int, typer.Option("--long", min=1, max=5_000, help="Long-lived connections.")] = 300,
    short_rate: Annotated[int, typer.Option(min=0, max=1_000, help="Short connections opened a second.")] = 100,
    seed: Annotated[int, typer.Option(help="Of reshuffles and which LB is lost, the same in all runs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="holdfast, hash_only or local_table; again for more.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the programs' logs in this folder.")] = None,
) -> None:
    """Keep connections open while backends and load balancers change, beside two baselines. Without root: simulated."""
    from lbpod.lab.demo.machine import lack
    from lbpod.lab.demo.show import EXIT_BROKEN, RUNS, Options, show
    from lbpod.lab.errors import LabError

    unknown = sorted(set(only or ()) - set(RUNS))
    if unknown:
        _fail(f"--only {unknown[0]} is not known; use {', '.join(RUNS)}", 2)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        _fail(f"--json {json_file}: there is no folder {json_file.absolute().parent}", 2)
    if json_file is not None and json_file.is_dir():
        _fail(f"--json {json_file}: that is a folder; name a file", 2)
    options = Options(
        seconds=seconds,
        long_count=long_count,
        short_rate=short_rate,
        seed=seed,
        json_file=json_file,
        runs=tuple(name for name in RUNS if only is None or name in only),
        log_dir=logs,
    )
    try:
        why = lack()
        status = _simulate(options, why) if why else show(options, Console())
    except LabError as error:
        _fail(str(error), 1)
    if status == EXIT_BROKEN:
        typer.echo("holdfast: our own run broke connections whose backend lived; that must not happen", err=True)
    raise typer.Exit(status)


def _simulate(options: "Options", why: str) -> int:
    """The show without packets; why: what is lacking for them."""
    typer.echo(f"No real packets here: {why}. So the same script is played in the simulator, on virtual time:")
    typer.echo("Holdfast's own decisions, all of them, beside a model of each of the two baselines.")
    argv = [sys.executable, "-m", "lbpod.lab.demo", "--seconds", str(options.seconds), "--seed", str(options.seed)]
    argv += ["--long", str(options.long_count), "--short-rate", str(options.short_rate)]
    argv += ["--json", str(options.json_file)] if options.json_file is not None else []
    for name in options.runs:
        argv += ["--only", name]
    return subprocess.run(argv, check=False).returncode


def _fail(sentence: str, status: int) -> NoReturn:
    typer.echo(f"holdfast: {sentence}", err=True)
    raise typer.Exit(status)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(demo)
