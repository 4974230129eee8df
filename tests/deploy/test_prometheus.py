"""Prometheus itself, where it is installed: the alerts, and every panel's query against a server.

`apt install prometheus` brings both programs.
"""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.bench.process import free_port
from app.cli import parse
from app.factory import create_app
from app.main import make_context
from app.settings import ApiKey, ServerSettings, read_environment
from model.loader import load_model
from tests.api.serve import real_server
from tests.deploy.board import DEPLOY, ask, dashboard_queries, fill_in
from tests.toy import write_toy_checkpoint

ALERT_TESTS = Path(__file__).with_name("alerts.test.yml")
DEADLINE_S = 60.0
NEEDS_MORE = ("gpu_", "spec_decode")  # a GPU; a flag, and a text that repeats itself


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_alerts_fire_when_they_should_and_only_then():
    promtool = program("promtool")
    for command in (["check", "rules", DEPLOY / "prometheus/alerts.yml"],
                    ["test", "rules", ALERT_TESTS]):  # fmt: skip
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def prometheus(server: str, key: str, folder: Path) -> Iterator[httpx.Client]:
    """Run Prometheus with compose's config, but for where things are; yields a client of it."""
    (folder / "key").write_text(key)
    given = (DEPLOY / "prometheus/prometheus.yml").read_text()
    job, _, _ = given.partition("    # Whichever of compose's services run")
    config = job.replace("/tmp/key", str(folder / "key")).replace("_interval: 5s", "_interval: 1s")
    config = config.replace("/etc/prometheus/alerts.yml", str(DEPLOY / "prometheus/alerts.yml"))
    target = server.removeprefix("http://")
    (folder / "prometheus.yml").write_text(
        f"{config}    static_configs: [{{targets: ['{target}']}}]\n"
    )
    port = free_port()
    process = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def test_every_panel_has_figures_under_load_with_a_key_for_metrics_alone(tmp_path):
    program("prometheus")
    keys = (ApiKey(name="a", key="a"), ApiKey(name="p", key="p", scope="metrics"))
    folder = write_toy_checkpoint(tmp_path / "toy", max_position_embeddings=256)
    command = parse(["serve", str(folder), "--device", "cpu"], read_environment())
    context = make_context(command, load_model(command.load))
    app = create_app(context, ServerSettings(named_keys=keys))
    queries = [
        fill_in(query, "30s")
        for _, query in dashboard_queries()
        if not any(name in query for name in NEEDS_MORE)
    ]
    assert len(queries) > 35
    body = {"prompt": "x" * 40, "max_tokens": 8}
    with real_server(app) as server, prometheus(server, "p", tmp_path) as client:
        missing = queries
        deadline_s = time.monotonic() + DEADLINE_S
        while missing and time.monotonic() < deadline_s:
            for body_sent in (body, {"prompt": 5.5}):
                headers = {"authorization": "Bearer a"}
                httpx.post(f"{server}/v1/completions", json=body_sent, headers=headers)
            missing = [query for query in missing if not ask(client, query)]
        refused = httpx.post(
            f"{server}/v1/completions", json=body, headers={"authorization": "Bearer p"}
        )
        firing = client.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert missing == []
    assert refused.status_code == 403
    assert json.dumps([rule["health"] for rule in firing]).count("ok") == len(firing) == 10
