"""What ``docs/metrics.md`` lists, for the tests that compare it with what is exported."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


def listed() -> list[str]:
    """Names of metrics, as a scrape has them, in the page's order."""
    return [name for name in _ROW.findall(PAGE.read_text()) if name.startswith("holdfast_")]


def verdicts_listed() -> list[str]:
    """Values of the label ``verdict``, in the page's order."""
    return [name for name in _ROW.findall(PAGE.read_text()) if not name.startswith("holdfast_")]


def unlisted(text: str) -> set[str]:
    """Names in the answer to a scrape that the page lacks."""
    scraped = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line.startswith("holdfast_")}
    made = {name for name in scraped if name.endswith("_created")}
    return scraped - made - set(listed())
