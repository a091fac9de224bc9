"""`holdfast doctor`: what this machine has of what an agent needs, as a table, and each lack as one sentence.

The same probe that an agent runs before it starts; nothing is loaded or attached that stays.
"""

from typing import Final

from rich.console import Console
from rich.table import Table

from lbpod.agent.uplink import UplinkError, describe, find_uplink
from lbpod.datapath.features import Feature, Finding, Need, probe

_ABOUT_INTERFACE: Final = frozenset({Feature.NATIVE_XDP, Feature.CLSACT, Feature.UNDERLAY_MTU})
"""What nobody can say of an interface that is not there."""


def examine(interface: str, address: str) -> bool:
    """Prints; True if an agent could start here. interface: its name, empty: that of the default route; address: the
    node's, empty: the interface's first one."""
    console = Console()
    name: str | None = interface or None
    usable = True
    try:
        uplink = find_uplink(interface, address)
        name, said = uplink.name, describe(uplink)
    except UplinkError as error:
        usable, said = False, str(error)
    console.print(f"uplink: {said}", highlight=False, soft_wrap=True)
    findings = {finding.feature: finding for finding in reversed(probe(name))}
    unknown = _ABOUT_INTERFACE if name is None or Feature.INTERFACE in findings else frozenset[Feature]()
    if name is None:
        unknown |= {Feature.INTERFACE}
    table = Table()
    for column in ("feature", "", "what to do"):
        table.add_column(column)
    for feature in Feature:
        table.add_row(feature.value, *(("-", "") if feature in unknown else _judged(findings.get(feature))))
    console.print(table)
    return usable and all(finding.need is not Need.REQUIRED for finding in findings.values())


def _judged(finding: Finding | None) -> tuple[str, str]:
    if finding is None:
        return "[green]yes[/green]", ""
    word = "[red]no[/red]" if finding.need is Need.REQUIRED else "[yellow]no[/yellow]"
    return word, finding.sentence
