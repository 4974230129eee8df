"""Dashboard and alerts ask only for metrics that a server has."""

import re

import pytest

from app.serving.energy import GpuMeter
from app.serving.metrics import RequestMetrics
from tests.api.test_metrics import Nvml
from tests.deploy.board import DEPLOY, dashboard_queries
from tests.fake_engine import FakeEngine, says

NAME = re.compile(r"\b(?:vllm|arriero|process)[:_][a-z0-9_]+")
QUERIES = [query for _, query in dashboard_queries()]


def test_every_metric_that_is_asked_for_exists():
    metrics = RequestMetrics("fake", FakeEngine(says("x")), GpuMeter(Nvml()))
    metrics.count_error("overloaded")
    page = metrics.render().decode()
    known = {re.split("[{ ]", line)[0] for line in page.splitlines() if not line.startswith("#")}
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text()
    asked = {name for text in (*QUERIES, alerts) for name in NAME.findall(text)}
    assert len(asked) > 25
    assert asked - known == set()


@pytest.mark.parametrize("query", QUERIES)
def test_every_panel_follows_the_choice_of_server(query):
    assert 'instance=~"$instance"' in query
