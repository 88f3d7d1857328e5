"""Dashboards and rules are what their scripts write, parse, and name only metrics that the code has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import promql_parser
import pytest
import yaml

from scripts import ROOT, load_script
from tpserve.coordinator.metrics_catalogue import CATALOGUE, ROUTER_CATALOGUE, sample_names

GRAFANA, PROMETHEUS = ROOT / "deploy/grafana", ROOT / "deploy/prometheus"


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def panel_expressions() -> list[str]:
    return [
        target["expr"].replace("$model", ".*").replace("$__rate_interval", "1m")
        for path in sorted(GRAFANA.glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    ]


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:tpserve|vllm)[_:][a-zA-Z0-9_:]+", expression))


def test_dashboards_are_what_the_script_writes() -> None:
    files = load_script("deploy/grafana/make_dashboards.py").files()
    assert {path.name for path in GRAFANA.glob("*.json")} == set(files)
    for name, text in files.items():
        assert (GRAFANA / name).read_text() == text, f"{name}: run deploy/grafana/make_dashboards.py"


def test_rules_are_what_the_script_writes() -> None:
    text = load_script("deploy/prometheus/make_rules.py").text()
    assert (PROMETHEUS / "rules.yaml").read_text() == text, "run deploy/prometheus/make_rules.py"


def test_dashboards_can_be_imported() -> None:
    uids = set()
    for path in GRAFANA.glob("*.json"):
        board = json.loads(path.read_text())
        uids.add(board["uid"])
        assert board["schemaVersion"] >= 36
        asks_for_model = any("$model" in target["expr"] for panel in board["panels"] for target in panel["targets"])
        variables = ["datasource", "model"] if asks_for_model else ["datasource"]
        assert [variable["name"] for variable in board["templating"]["list"]] == variables
        ids = [panel["id"] for panel in board["panels"]]
        assert len(ids) == len(set(ids))
        cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(cells) == len(set(cells)), "panels lie on each other"
    assert len(uids) == 6


def test_every_expression_parses_and_names_what_the_code_exports() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    known = sample_names() | sample_names(ROUTER_CATALOGUE) | recorded
    expressions = panel_expressions() + [rule["expr"] for rule in rules()]
    assert len(expressions) > 150
    for expression in expressions:
        promql_parser.parse(expression)
        assert names_in(expression) <= known, expression


def test_every_metric_is_on_a_board() -> None:
    shown = set().union(*map(names_in, panel_expressions()))
    for spec in (*CATALOGUE, *ROUTER_CATALOGUE):
        if spec.name != "gateway_engine_up":  # an alert
            assert any(spec.full_name + suffix in shown for suffix in spec.suffixes), spec.name


def test_promtool_accepts_the_rules_and_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
