"""What the audience sees: one live panel while a run goes on, one table at the end.

Decides wording and layout only. Where the output is no terminal, the panel becomes a line every few seconds, so that a
log of CI reads like a report.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lbpod.lab.cluster import TITLES
from lbpod.lab.demo.tally import Figures

EVENTS_SHOWN_MAX: Final = 8
SPARKS: Final = "▁▂▃▄▅▆▇█"
SPARKS_MAX: Final = 60
LINE_EVERY_SECONDS: Final = 4


@dataclass
class Screen:
    """State of the live view of one run. `history` values are per look."""

    console: Console
    title: str
    seconds: int
    figures: Figures
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS_SHOWN_MAX))
    tracking: deque[int] = field(default_factory=lambda: deque(maxlen=SPARKS_MAX))
    relayed: deque[int] = field(default_factory=lambda: deque(maxlen=SPARKS_MAX))
    broken: deque[int] = field(default_factory=lambda: deque(maxlen=SPARKS_MAX))
    elapsed: float = 0.0
    _last_line: float = -LINE_EVERY_SECONDS

    def happened(self, what: str, elapsed: float) -> None:
        """An event for the list."""
        self.events.append(f"{elapsed:5.1f} s  {what}")
        if not self.console.is_terminal:
            self.console.print(f"  {elapsed:5.1f} s  {what}")

    def looked(self, elapsed: float, tracking: int, relayed: int) -> None:
        """New figures of the LBs: slots tracking (the most at one LB), packets relayed since the last look."""
        self.elapsed = elapsed
        self.tracking.append(tracking)
        self.relayed.append(relayed)
        self.broken.append(self.figures.broken)
        if not self.console.is_terminal and elapsed - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = elapsed
            self.console.print(
                f"  {elapsed:5.1f} s  {self.figures.connections:,} connections, {self.figures.broken} broken, "
                f"{tracking:,} slots tracking, {self.figures.relayed_packets:,} packets relayed"
            )

    def __rich__(self) -> Panel:
        figures = self.figures
        broken_style = "bold green" if figures.broken == 0 else "bold red"
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="left", min_width=18)
        table.add_column(justify="right", min_width=10)
        table.add_column(justify="left")
        table.add_row("connections", f"{figures.connections:,}", f"{figures.long_lived:,} long-lived open now")
        table.add_row("BROKEN", Text(f"{figures.broken:,}", style=broken_style), Text(spark(self.broken), style="red"))
        table.add_row("backend gone", f"{figures.broken_backend_gone:,}", "their pod was removed: nobody could help")
        table.add_row("backend changes", f"{figures.backend_changes:,}", "")
        table.add_row("ECMP reshuffles", f"{figures.ecmp_reshuffles:,}", "")
        table.add_row("LBs lost, joined", f"{figures.lb_losses}, {figures.lb_joins}", "")
        table.add_row("tracking slots", f"{_last(self.tracking):,}", Text(spark(self.tracking), style="yellow"))
        table.add_row("packets relayed", f"{figures.relayed_packets:,}", Text(spark(self.relayed), style="cyan"))
        table.add_row("flows resolved", f"{figures.resolved_flows:,}", "asked of their owners")
        done = min(1.0, self.elapsed / self.seconds)
        bar = "━" * round(40 * done) + "·" * (40 - round(40 * done))
        events = Text("\n".join(self.events) or "opening connections ...", style="dim")
        return Panel(
            Group(table, Text(""), events, Text(f"\n{bar} {min(self.elapsed, self.seconds):.0f} of {self.seconds} s")),
            title=f"[bold]{self.title}",
            width=100,
        )


def live(screen: Screen) -> Live:
    """The live panel; on anything but a terminal it shows nothing (`Screen` prints lines then)."""
    console = screen.console if screen.console.is_terminal else Console(quiet=True)
    return Live(screen, console=console, refresh_per_second=5, transient=True)


def spark(values: deque[int]) -> str:
    """A line of little bars, as high as the largest of them."""
    top = max(values, default=0)
    if top <= 0:
        return ""
    return "".join(SPARKS[(len(SPARKS) - 1) * max(0, value) // top] for value in values)


def _last(values: deque[int]) -> int:
    return values[-1] if values else 0


def comparison(runs: dict[str, Figures], title: str) -> Table:
    """The runs side by side."""
    table = Table(title=title, title_style="bold")
    table.add_column("")
    for name in runs:
        table.add_column(TITLES[name], justify="right", style="bold" if name == "holdfast" else "")

    def row(label: str, *values: str, style: str = "") -> None:
        table.add_row(label, *values, style=style)

    row("connections", *(f"{one.connections:,}" for one in runs.values()))
    row("  long-lived, open at the end", *(f"{one.long_lived:,}" for one in runs.values()))
    row("backend changes", *(f"{one.backend_changes:,}" for one in runs.values()))
    row("ECMP reshuffles", *(f"{one.ecmp_reshuffles:,}" for one in runs.values()))
    row("LBs destroyed / joined", *(f"{one.lb_losses} / {one.lb_joins}" for one in runs.values()))
    row("BROKEN, though the backend lived", *(_broken(one.broken) for one in runs.values()))
    row("broken, backend gone", *(f"{one.broken_backend_gone:,}" for one in runs.values()))
    row("broken, nobody can tell", *(f"{one.broken_unattributed:,}" for one in runs.values()))
    if not any(one.simulated for one in runs.values()):
        row("request p50 / p99", *(f"{one.latency_p50_us:,} / {one.latency_p99_us:,} us" for one in runs.values()))
    ours = [one if name == "holdfast" else None for name, one in runs.items()]  # the baselines know nothing of these
    row("packets relayed", *(f"{one.relayed_packets:,}" if one else "-" for one in ours))
    row("flows resolved", *(f"{one.resolved_flows:,}" if one else "-" for one in ours))
    row("tracking slots, most", *(f"{one.tracking_slots_peak:,}" if one else "-" for one in ours))
    row("tracking slots, clients gone", *(f"{one.tracking_slots_end:,}" if one else "-" for one in ours))
    return table


def _broken(count: int) -> str:
    return f"[green]{count:,}[/green]" if count == 0 else f"[red]{count:,}[/red]"
