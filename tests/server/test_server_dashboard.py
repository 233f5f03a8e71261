"""The dashboard asks for nothing that /metrics does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeEngine

from miniserve.core import StepTotals
from miniserve.server.generation import Turns
from miniserve.server.metrics import ServerMetrics

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "examples" / "grafana.json").read_text(encoding="utf-8")
)


def test_every_metric_and_label_of_the_dashboard_exists() -> None:
    engine: Any = FakeEngine()
    engine.totals = StepTotals(timed_host=1.0)
    body, _ = ServerMetrics(engine, Turns(1, 1, 1), "m").render("")
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    asked = 0
    for query in queries:
        names = re.findall(r"(?:vllm|miniserve):\w+", query)
        grouped = re.findall(r"by \((\w+)\)", query) + re.findall(r"label_values\(.*, (\w+)\)", query)
        for name in names:
            asked += 1
            assert name in labels, query
            assert {"model_name", *grouped} <= labels[name], query
    assert asked > 30


def test_the_panels_do_not_cover_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
