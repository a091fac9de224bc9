"""`holdfast controller` and `holdfast check`: options only; what they do is in lbpod.standalone.

The form of the logs is chosen here, above agent and controller, because the two must not know each other and yet
should log alike.
"""

from pathlib import Path
from typing import Annotated

import typer


def controller(
    config: Annotated[Path, typer.Option(help="The file with VirtualServices, backends and nodes; it is watched.")],
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT for health, metrics and state.")] = "127.0.0.1:9901",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the controller of a cluster without Kubernetes."""
    from lbpod.logs import configure_logs
    from lbpod.standalone.driver import run

    if log_level not in {"debug", "info", "warning", "error"}:
        typer.echo(f"holdfast: --log-level {log_level} is not known; use debug, info, warning or error", err=True)
        raise typer.Exit(2)
    configure_logs(log_level, "controller")
    raise typer.Exit(run(config, listen))


def check(config: Annotated[Path, typer.Argument(metavar="FILE", help="The controller's file.")]) -> None:
    """Say whether a controller's file is good, or what is wrong with it: file, line, field."""
    from lbpod.standalone.config import check as check_file

    raise typer.Exit(check_file(config))


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(controller)
    app.command()(check)
