"""The `holdfast` command: what exists, which options it takes, and how a mistake is said.

Every command imports what it needs when it runs (`holdfast --help` must not load the kernel's half), and every error
ends in one sentence on standard error: exit status 2 for input that cannot be (a setting, a file), 1 for a machine
that lacks something or a call that fails. Usage errors of the parser come out the same way, without a frame around
them.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Final, NoReturn, cast

import typer

from lbpod.agent.__main__ import BAD_INPUT, LACKING

app = typer.Typer(
    name="holdfast",
    help="A layer-4 load balancer that never moves an established connection while its backend lives.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED: Final = 130

Text = str | None


def fail(sentence: str, status: int) -> NoReturn:
    """Ends the command with one sentence."""
    typer.echo(f"holdfast: {sentence}", err=True)
    raise typer.Exit(status)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"holdfast {version('holdfast')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def agent(
    node: Annotated[Text, typer.Option(help="Name of this node. [default: the host name]")] = None,
    node_address: Annotated[Text, typer.Option(help="Its address in the cluster. [default: of the interface]")] = None,
    interface: Annotated[Text, typer.Option(help="The uplink. [default: the default route's]")] = None,
    listen: Annotated[Text, typer.Option(help="ADDRESS:PORT for controller and peers. [default: 0.0.0.0:9900]")] = None,
    metrics_listen: Annotated[
        Text, typer.Option(help="ADDRESS:PORT for health and metrics. [default: 127.0.0.1:9902]")
    ] = None,
    tls: Annotated[Text, typer.Option(help="Folder with certificates. [default: /etc/holdfast/tls]")] = None,
    state: Annotated[Text, typer.Option(help="Folder to remember in. [default: /run/holdfast]")] = None,
    bpf_object: Annotated[Text, typer.Option(help="The compiled programs. [default: the packaged ones]")] = None,
    pins: Annotated[Text, typer.Option(help="Folder for pins. [default: /sys/fs/bpf/holdfast]")] = None,
    map_sizes: Annotated[Text, typer.Option(help="Sizes of new maps, as records=65536,nat=65536.")] = None,
    on_term: Annotated[Text, typer.Option(help="On SIGTERM: leave (the ring) or stay. [default: leave]")] = None,
    withdraw_seconds: Annotated[
        Text, typer.Option(help="From /readyz's 503 until it asks to leave. [default: 1]")
    ] = None,
    detach_on_exit: Annotated[
        bool | None, typer.Option("--detach-on-exit", help="At the end, take the programs off and unpin everything.")
    ] = None,
    redis_url: Annotated[
        Text, typer.Option(help="Redis to write diagnostics to: redis://[USER@]HOST[:PORT][/DATABASE].")
    ] = None,
    redis_password_file: Annotated[Text, typer.Option(help="File with its password.")] = None,
    log_level: Annotated[Text, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
) -> None:
    """Run one node's agent. Each option can also be set as HOLDFAST_<OPTION> in the environment."""
    from lbpod.agent.__main__ import run

    options = {
        "node": node,
        "node_address": node_address,
        "interface": interface,
        "listen": listen,
        "metrics_listen": metrics_listen,
        "tls": tls,
        "state": state,
        "bpf_object": bpf_object,
        "pins": pins,
        "map_sizes": map_sizes,
        "on_term": on_term,
        "withdraw_seconds": withdraw_seconds,
        "detach_on_exit": None if detach_on_exit is None else "yes",
        "redis_url": redis_url,
        "redis_password_file": redis_password_file,
        "log_level": log_level,
    }
    if status := run(options, "holdfast"):
        raise typer.Exit(status)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go; kept secret from others.")],
    nodes: Annotated[
        list[str] | None, typer.Argument(metavar="[NODES]...", help="Names of the nodes; none: those in DIR.")
    ] = None,
) -> None:
    """Make a cluster CA and certificates for controller, viewer and nodes, valid for 730 days, the CA for 3,650. Renew
    what has less than 60 days left, of the nodes that are named, or of all that are in DIR where none is."""
    from lbpod.certs import CertsError
    from lbpod.minting import mint, minted_nodes

    try:
        written = mint(folder, nodes or minted_nodes(folder))
    except CertsError as error:
        fail(str(error), BAD_INPUT)
    for path in written:
        typer.echo(str(path))
    if not written:
        typer.echo(f"everything in {folder} is still good")


@app.command()
def doctor(
    interface: Annotated[Text, typer.Option(help="The uplink. [default: the default route's]")] = None,
    node_address: Annotated[Text, typer.Option(help="Its address in the cluster. [default: of the interface]")] = None,
) -> None:
    """Say what this machine has of what an agent needs."""
    from lbpod.cli.doctor import examine

    if not examine(interface or "", node_address or ""):
        raise typer.Exit(LACKING)


@app.command()
def detach(
    pins: Annotated[Path, typer.Option(help="Folder for pins, as the agent's.")] = Path("/sys/fs/bpf/holdfast"),
    state: Annotated[Path, typer.Option(help="Folder that the agent remembers in.")] = Path("/run/holdfast"),
) -> None:
    """Take programs and maps off this machine. VIP traffic through it ends; stop the agent first."""
    from lbpod.cli.detach import take_off
    from lbpod.datapath.port import DatapathError

    try:
        typer.echo(take_off(pins, state))
    except DatapathError as error:
        fail(str(error), LACKING)


@app.command()
def status(
    node: Annotated[list[str], typer.Option(help="HOST:PORT of an agent; give it again for another.")],
    tls: Annotated[Path, typer.Option(help="Folder that `holdfast certs` made (the viewer's certificate is used).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what the agents say, as JSON.")] = False,
) -> None:
    """Show where agents stand. Exit status 1 unless every one of them has answered and is ready."""
    from lbpod.certs import CertsError
    from lbpod.cli.status import show

    try:
        if not show(node, tls, as_json=as_json):
            raise typer.Exit(LACKING)
    except (CertsError, ValueError) as error:
        fail(str(error), BAD_INPUT)


def _register_others() -> None:
    """Commands that bring their options with them: modules with `register(app)`."""
    for module in ("lbpod.cli.standalone", "lbpod.cli.demo", "lbpod.cli.chaos"):
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(app)


_register_others()


# typer carries click's classes under another name in each of its versions; these two are the same in all of them.
_ClickError = cast(type[Exception], typer.BadParameter.__mro__[2])
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def main() -> None:
    """Every command; `entry` has looked first whether it can do without."""
    try:
        outcome = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except _ClickError as error:
        wrong_usage = isinstance(error, _UsageError)
        said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        typer.echo(f"holdfast: {said}. See holdfast --help." if wrong_usage else f"holdfast: {said}", err=True)
        sys.exit(BAD_INPUT if wrong_usage else LACKING)
    sys.exit(outcome if isinstance(outcome, int) else 0)
