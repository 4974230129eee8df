"""The image and the compose file on a real engine, with the demo model; skipped where it lacks.

docker build --target cpu -t arriero:cpu . && scripts/test tests/deploy/test_containers.py
"""

import re
import threading

import httpx
import openai
import pytest

from app.settings import read_environment
from model.errors import WeightsError
from model.weights.demo import fetch_demo_model
from tests.deploy.board import ask
from tests.deploy.compose import (
    Project,
    docker,
    need_images,
    state,
    wait_until,
    wait_until_healthy,
)

pytestmark = pytest.mark.demo
MODEL = "smollm2-135m-instruct"
LONG = 400  # tokens of an answer that takes some seconds
WHOLE = "200, length, data: [DONE]"


@pytest.fixture(scope="module", autouse=True)
def _demo_model():
    """Skip where a container could not fetch the model either."""
    need_images("cpu")
    try:
        fetch_demo_model(read_environment().cache_dir, lambda _: None)
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("served"))
    try:
        project.run("up", "-d", "cpu")
        wait_until_healthy(*project.containers("cpu"))
        yield project
    finally:
        project.close()


def stream(base_url: str, tokens: int, after_first: threading.Event | None = None) -> str:
    """Stream an answer of so many tokens; returns how it ended."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "stream": True,
    }
    reason, last = "", ""
    url = f"{base_url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            for line in filter(None, response.iter_lines()):
                if after_first is not None and '"content"' in line:
                    after_first.set()
                found = re.search(r'"finish_reason":"(\w+)"', line)
                reason, last = (found[1] if found else reason), line
    except httpx.TransportError as error:
        return repr(error)
    return f"{response.status_code}, {reason}, {last}"


def test_openai_sdk_through_the_published_port(served):
    client = openai.OpenAI(base_url=f"{served.url('cpu')}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == [MODEL]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello!"}], max_tokens=8
    )
    assert answer.usage.completion_tokens > 0
    assert httpx.get(f"{served.url('cpu')}/").status_code == 200


def test_server_runs_without_root_capabilities_or_a_root_to_write_to(served):
    [container] = served.containers("cpu")
    script = "id -u; grep -E 'CapBnd|NoNewPrivs' /proc/1/status\n"
    script += "for folder in / /opt/arriero /home/arriero /tmp /home/arriero/.cache\n"
    script += 'do touch "$folder/x" 2>/dev/null && echo "$folder"; done'
    assert docker("exec", container, "sh", "-c", script).split("\n")[:-1] == [
        "1000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "/tmp",
        "/home/arriero/.cache",
    ]


def test_every_level_of_native_code_and_traces_are_in_the_image(served):
    [container] = served.containers("cpu")
    script = "import opentelemetry.exporter.otlp.proto.http, glob, model.cpu as cpu\n"
    script += "print(len(glob.glob(cpu.__path__[0] + '/lib/*.so')))"
    assert docker("exec", container, "python", "-c", script).split() == ["3"]
    assert "native" in served.log("cpu")


def test_a_stream_ends_whole_when_the_server_is_stopped_and_the_next_start_fetches_nothing(served):
    [container] = served.containers("cpu")
    begun = threading.Event()
    ends: list[str] = []
    reader = threading.Thread(target=lambda: ends.append(stream(served.url("cpu"), LONG, begun)))
    reader.start()
    assert begun.wait(timeout=60)
    served.run("stop", "cpu")
    reader.join()
    assert ends == [WHOLE]
    assert state(container)["ExitCode"] == 0
    served.run("start", "cpu")
    wait_until_healthy(container)
    assert stream(served.url("cpu"), 4) == WHOLE
    assert served.log("cpu").count("downloading") == 1


def servers_up(project: Project) -> int:
    """Return how many servers the proxy sends requests to, from the last that it said of each."""
    said = re.findall(r"Server servers/(replica\d+) is (UP|going DOWN|DOWN)", project.log("proxy"))
    return list(dict(said).values()).count("UP")


def test_callers_of_the_proxy_notice_nothing_when_one_server_after_the_other_starts_anew(tmp_path):
    need_images("proxy")
    project = Project(tmp_path)
    done = threading.Event()
    ends: list[str] = []

    def call() -> None:
        while not done.is_set():
            ends.append(stream(project.url("proxy"), 30))

    callers = [threading.Thread(target=call) for _ in range(4)]
    try:
        project.run("up", "-d", "--scale", "replica=2", "proxy")
        wait_until(lambda: servers_up(project) == 2, "two servers behind the proxy")
        for caller in callers:
            caller.start()
        for container in project.containers("replica"):
            docker("stop", "--time", "40", container)
            assert state(container)["ExitCode"] == 0
            wait_until(lambda: servers_up(project) == 1, "the proxy without this server")
            docker("start", container)
            wait_until(lambda: servers_up(project) == 2, "the server back behind the proxy")
        done.set()
        for caller in callers:
            caller.join()
        chosen = set(re.findall(r"servers/(replica\d+) .*POST", project.log("proxy")))
        assert httpx.get(f"{project.url('proxy')}/metrics").status_code == 404
    finally:
        done.set()
        project.close()
    assert set(ends) == {WHOLE}
    assert chosen == {"replica1", "replica2"}


def test_prometheus_scrapes_with_the_key_for_metrics(tmp_path):
    need_images("prometheus")
    project = Project(tmp_path, ARRIERO_API_KEY="all", ARRIERO_METRICS_KEY="few")
    try:
        project.run("up", "-d", "cpu", "prometheus")
        with httpx.Client(base_url=project.url("prometheus")) as client:
            wait_until(lambda: ask(client, "arriero:ready") == [1.0], "the server's metrics")
        refused = httpx.post(f"{project.url('cpu')}/v1/completions", json={})
    finally:
        project.close()
    assert refused.status_code == 401
