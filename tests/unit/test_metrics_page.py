"""The page of metrics: a name that it lacks is one that nobody looks at, and one too many is looked for in vain."""

import re
from pathlib import Path

from prometheus_client import generate_latest

from lboperator.metrics import OperatorMetrics
from lbpod.core.verdicts import Verdict
from lbpod.standalone.http import FileMetrics
from tests.metrics_page import listed, unlisted, verdicts_listed

ROOT = Path(__file__).parents[2]
SOURCES = (
    "lbpod/agent/metrics.py",
    "lbpod/controller/metrics.py",
    "lbpod/standalone/http.py",
    "operator/lboperator/metrics.py",
)


def test_it_lists_what_the_sources_name_once_each() -> None:
    named = {name for path in SOURCES for name in re.findall(r'"(holdfast_\w+)"', (ROOT / path).read_text())}
    assert len(named) > 60
    assert named == {name.removesuffix("_total") for name in listed()}
    assert len(listed()) == len(set(listed()))


def test_counters_are_listed_as_a_scrape_has_them() -> None:
    for metrics in (FileMetrics(), OperatorMetrics()):
        assert set() == unlisted(generate_latest(metrics.registry).decode())


def test_it_says_what_each_verdict_means() -> None:
    assert {verdict.name.lower() for verdict in Verdict} == set(verdicts_listed())
    assert len(Verdict) == len(verdicts_listed())
