"""A server process with faults inside: who pays for them, what is said of them, how it ends."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model.step import SamplingParams
from tests.fake_engine import VOCAB, ByteTokenizer
from tests.fake_runner import expected_tokens

ROOT = Path(__file__).parents[2]


class Server:
    """A running server of the battery."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def post(self, prompt: str, **fields) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "seed": 0}
        body["return_token_ids"] = True
        return httpx.post(f"{self.url}/v1/completions", json={**body, **fields}, timeout=30)

    def wait(self, condition, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            threading.Event().wait(0.02)


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.battery.server"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        port = int(process.stdout.readline())
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.communicate()


def tokens_of(prompt: str) -> list[int]:
    ids = ByteTokenizer().encode(prompt, add_special_tokens=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=frozenset({257}))
    return expected_tokens(ids, sampling, VOCAB)


def check_canary(server: Server) -> None:
    answer = server.post("canary")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["token_ids"] == tokens_of("canary")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("fault", ["raise", "once", "bug"])
def test_fault_costs_its_own_request_at_most(server, fault):
    prompts = [f"neighbour {n}" for n in range(6)]
    with ThreadPoolExecutor(8) as pool:
        bad = pool.submit(server.post, f"x fault:{fault} x")
        good = list(pool.map(server.post, prompts))
    for prompt, answer in zip(prompts, good, strict=True):
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["token_ids"] == tokens_of(prompt)
    if fault == "raise":
        error = bad.result().json()["error"]
        assert bad.result().status_code == 500
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        assert "Memory" not in error["message"]
    else:
        assert bad.result().status_code == 200
    check_canary(server)
    metrics = httpx.get(f"{server.url}/metrics").text
    counted = {"raise": "isolated_sequences", "once": "failed_steps", "bug": "engine_recoveries"}
    line = next(x for x in metrics.splitlines() if x.startswith(f"vllm:{counted[fault]}_total"))
    assert float(line.split()[-1]) >= 1
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def stream_events(server: Server, prompt: str) -> list[dict]:
    events = []
    body = {"prompt": prompt, "max_tokens": 400, "stream": True}
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
    return events


def test_hang_is_seen_told_and_ends_the_process_with_an_error(server):
    check_canary(server)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream_events, server, f"s{n}") for n in range(2)]
        streams.append(pool.submit(stream_events, server, "fault:hang"))
        sick = []

        def is_sick() -> bool:
            try:
                sick.append(httpx.get(f"{server.url}/health/live", timeout=5).status_code)
            except httpx.TransportError:
                return True
            return sick[-1] == 503

        server.wait(is_sick)
        assert server.process.wait(30) == 1
        hung = streams[-1].result()
    assert "error" in hung[-1]
    log = server.log.read_text()
    assert "takes far too long" in log
    assert "in _break" in log  # where it hangs, in the stacks
    assert "the step is given up" in log


def test_device_that_is_lost_ends_every_stream_and_the_process_with_an_error(server):
    check_canary(server)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream_events, server, f"s{n}") for n in range(3)]
        lost = pool.submit(server.post, "fault:lost")
        assert server.process.wait(30) == 1
        assert lost.result().status_code in (500, 503)
        for stream in streams:
            events = stream.result()
            assert not events or "error" in events[-1] or events[-1]["choices"][0]["finish_reason"]
    assert "the engine has died" in server.log.read_text()
