"""Dashboard and alerts ask only for metrics that a server has."""

import json
import re
from pathlib import Path

import pytest

from app.serving.energy import GpuMeter
from app.serving.metrics import RequestMetrics
from tests.api.test_metrics import Nvml
from tests.fake_engine import FakeEngine, says

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAME = re.compile(r"\b(?:vllm|arriero|process)[:_][a-z0-9_]+")


def dashboard_queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/arriero.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_every_metric_that_is_asked_for_exists():
    metrics = RequestMetrics("fake", FakeEngine(says("x")), GpuMeter(Nvml()))
    metrics.count_error("overloaded")
    page = metrics.render().decode()
    known = {re.split("[{ ]", line)[0] for line in page.splitlines() if not line.startswith("#")}
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text()
    asked = {name for text in (*dashboard_queries(), alerts) for name in NAME.findall(text)}
    assert len(asked) > 25
    assert asked - known == set()


@pytest.mark.parametrize("query", dashboard_queries())
def test_every_panel_follows_the_choice_of_server(query):
    assert 'instance=~"$instance"' in query
