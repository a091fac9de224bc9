"""`holdfast demo`: options, a look at the machine, and the show.

Apart from ``main`` so that the command line of a pod does not know the lab; where the machine cannot run it, one
sentence says what it lacks, and the exit status is 1.
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    seconds: Annotated[int, typer.Option(min=16, max=3_600, help="Length of each of the three runs.")] = 32,
    long_count: Annotated[int, typer.Option("--long", min=1, max=5_000, help="Long-lived connections.")] = 300,
    short_rate: Annotated[int, typer.Option(min=0, max=1_000, help="Short connections opened a second.")] = 100,
    seed: Annotated[int, typer.Option(help="Of reshuffles and which LB is lost, the same in all runs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="holdfast, hash_only or local_table; again for more.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the programs' logs in this folder.")] = None,
) -> None:
    """Balance real connections over real backends while both change, beside two baselines. Needs root."""
    from lbpod.lab.demo.show import EXIT_BROKEN, RUNS, Options, show
    from lbpod.lab.errors import LabError

    unknown = sorted(set(only or ()) - set(RUNS))
    if unknown:
        typer.echo(f"holdfast: --only {unknown[0]} is not known; use {', '.join(RUNS)}", err=True)
        raise typer.Exit(2)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        typer.echo(f"holdfast: --json {json_file}: there is no folder {json_file.absolute().parent}", err=True)
        raise typer.Exit(2)
    if json_file is not None and json_file.is_dir():
        typer.echo(f"holdfast: --json {json_file}: that is a folder; name a file", err=True)
        raise typer.Exit(2)
    if os.geteuid() != 0:
        typer.echo("holdfast: the demo makes network namespaces and loads BPF programs; run it as root", err=True)
        raise typer.Exit(1)
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
        status = show(options, Console())
    except LabError as error:
        typer.echo(f"holdfast: {error}", err=True)
        raise typer.Exit(1) from error
    if status == EXIT_BROKEN:
        typer.echo("holdfast: our own run broke connections whose backend lived; that must not happen", err=True)
    raise typer.Exit(status)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(demo)
