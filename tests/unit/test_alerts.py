"""The chart's alerts, judged by Prometheus' own promtool: when they fire, and what they leave alone.

Time begins at 0 and goes in minutes, as promtool writes it: "0+60x20" is 0, 60, 120 ... 1200, one sample a minute.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
import yaml

from lboperator.shell import BLIND_NS
from lbpod.core.limits import SWEEP_NS

judged = pytest.mark.skipif(shutil.which("promtool") is None, reason="missing feature: promtool (Debian's prometheus)")
ALERTS: Final = Path(__file__).parents[2] / "charts/holdfast/files/alerts.yaml"
LABELS: Final = 'instance="10.0.0.1:9901",job="operator"'


def fires(folder: Path, alert: str, series: Mapping[str, str], expected: Mapping[int, bool]) -> None:
    """Minute -> whether the alert fires then. A name ends in its labels, where it has some of its own."""
    rules = {"groups": [{"name": "holdfast", "rules": yaml.safe_load(ALERTS.read_text())}]}
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    named = {name.partition("{")[0]: name.partition("{")[2].rstrip("}") for name in series}
    asked = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    one = {
        "interval": "1m",
        "input_series": [
            {"series": f"{name}{{{LABELS}{',' if own else ''}{own}}}", "values": values}
            for (name, own), values in zip(named.items(), series.values(), strict=True)
        ],
        "promql_expr_test": [
            {"expr": asked, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": 1}] if is_on else []}
            for minute, is_on in expected.items()
        ],
    }
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [one]}
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    ran = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert 0 == ran.returncode, ran.stdout + ran.stderr


@judged
def test_changes_that_come_into_force_one_after_the_other_are_not_stuck(tmp_path: Path) -> None:
    busy = {'holdfast_controller_phase{phase="idle"}': "0x60"}
    quiet = {"holdfast_controller_changes": "7x60", "holdfast_controller_ring_changes": "2x60"}
    name = "HoldfastChangeStuck"
    fires(tmp_path, name, busy | quiet, {4: False, 6: True, 30: True})
    for moving in quiet:
        fires(tmp_path, name, busy | quiet | {moving: "7+1x60"}, {6: False, 30: False, 59: False})
    fires(tmp_path, name, busy | quiet | {"holdfast_controller_changes": "7+1x20 27x40"}, {20: False, 32: True})
    idle = {'holdfast_controller_phase{phase="idle"}': "1x60"}
    fires(tmp_path, name, idle | quiet, {30: False})


@judged
def test_a_load_balancer_is_lost_where_one_that_should_be_is_not_in_the_ring(tmp_path: Path) -> None:
    name, ring = "HoldfastLoadBalancerLost", "holdfast_controller_ring_changes"
    lbs, lost, wanted = "holdfast_controller_lbs", "holdfast_controller_lost_lbs", "holdfast_operator_wanted_lbs"
    gone = {lbs: "5x9 4x50", lost: "0x60", wanted: "5x60", ring: "1x9 2x50"}
    fires(tmp_path, name, gone, {9: False, 15: False, 26: True, 50: True})
    stays = {lbs: "5x60", lost: "0x9 1x50", wanted: "5x60", ring: "1x60"}
    fires(tmp_path, name, stays, {9: False, 21: True})
    taken_out = {lbs: "5x9 4x50", lost: "0x60", wanted: "5x9 4x50", ring: "1x9 2x50"}
    fires(tmp_path, name, taken_out, {9: False, 26: False, 50: False})
    rolling = {lbs: "4x60", lost: "0x60", wanted: "5x60", ring: "1+2x60"}
    fires(tmp_path, name, rolling, {15: False, 30: False, 59: False})
    stands_by = {lbs: "0x60", lost: "0x60", wanted: "0x60", ring: "0x60"}
    fires(tmp_path, name, stands_by, {30: False})


@judged
def test_an_operator_that_is_told_nothing_is_blind_and_one_that_stands_by_is_not(tmp_path: Path) -> None:
    name, swept, observed = (
        "HoldfastOperatorBlind",
        *(f"holdfast_operator_{one}_timestamp_seconds" for one in ("swept", "observed")),
    )
    fires(tmp_path, name, {swept: "0+60x60", observed: "60x60"}, {15: False, 60: False})
    fires(tmp_path, name, {swept: "0+60x10 600x50", observed: "60x60"}, {19: False, 23: True, 60: True})
    fires(tmp_path, name, {swept: "0+60x10 600x20 1860+60x30", observed: "60x60"}, {29: True, 33: False})
    fires(tmp_path, name, {swept: "0x60", observed: "0x60"}, {30: False})


@judged
def test_a_certificate_that_ends_within_a_week_is_told_of_and_a_renewed_one_is_not(tmp_path: Path) -> None:
    day = 24 * 60
    ends = {"holdfast_certificate_expiry_timestamp_seconds": f"{9 * day * 60}x{4 * day}"}
    fires(tmp_path, "HoldfastCertificateEnds", ends, {day: False, 2 * day: False, 2 * day + 90: True, 4 * day: True})
    renewed = dict.fromkeys(ends, f"{9 * day * 60}x{3 * day} {800 * day * 60}x{day}")
    fires(tmp_path, "HoldfastCertificateEnds", renewed, {3 * day - 1: True, 3 * day + 5: False})


def test_the_alert_and_readyz_call_it_blind_at_the_same_time() -> None:
    (rule,) = (one for one in yaml.safe_load(ALERTS.read_text()) if one["alert"] == "HoldfastOperatorBlind")
    assert f"> {BLIND_NS // 1_000_000_000} and" in rule["expr"]
    assert 5 * SWEEP_NS <= BLIND_NS
