"""`arriero bench serve` against real servers: a scripted one, and this one with a fake engine."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.bench.client import Completion
from app.bench.figures import Load, most_at_once, percentile, summarise, text_of
from app.bench.load import Draft, Sent
from app.bench.peer import WireRequest
from app.bench.plot import picture, token_rate
from app.cli import build_parser, main
from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import real_server
from tests.fake_engine import FakeEngine, make_context, says

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4"]


def answer(started_s: float, arrivals_s: tuple[float, ...], ended_s: float, num: int) -> Completion:
    return Completion(
        started_s=started_s,
        first_token_s=arrivals_s[0],
        last_token_s=arrivals_s[-1],
        ended_s=ended_s,
        num_output_tokens=num,
        arrivals_s=arrivals_s,
    )


def sent_of(completion: Completion | None, fault: str | None = None) -> Sent:
    draft = Draft(request=WireRequest(path="/", body={}), num_input=7, num_output=3)
    due_s = completion.started_s if completion else 0.0
    return Sent(draft=draft, due_s=due_s, completion=completion, fault=fault)


FAST = answer(0.0, (0.1, 0.2, 0.3), 0.3, 3)
SLOW = answer(0.1, (0.6, 0.8, 1.0), 1.1, 3)
LOAD = Load(
    request_rate=float("inf"),
    max_concurrency=None,
    percentiles=(50.0, 100.0),
    goodput_ms={"ttft": 200.0, "tpot": 150.0},
)


def test_figures_are_those_of_hand():
    record = summarise([sent_of(FAST), sent_of(SLOW), sent_of(None, "gone")], LOAD, 0.22)
    expected = {
        "completed": 2, "failed": 1, "fault": "gone", "duration": 1.1, "total_input_tokens": 14,
        "total_output_tokens": 6, "output_throughput": 6 / 1.1, "request_throughput": 2 / 1.1,
        "total_token_throughput": 20 / 1.1, "max_concurrent_requests": 2, "client_cpu_share": 0.2,
        "good": 1, "request_goodput": 1 / 1.1, "mean_ttft_ms": 300.0, "median_ttft_ms": 300.0,
        "p100_ttft_ms": 500.0, "std_ttft_ms": 200.0, "mean_tpot_ms": 150.0, "p100_tpot_ms": 200.0,
        "mean_itl_ms": 150.0, "p50_e2el_ms": 650.0, "request_rate": "inf",
    }  # fmt: skip
    found = {key: record[key] for key in expected}
    assert found == pytest.approx(expected)
    json.dumps(record, allow_nan=False)


def test_table_has_a_line_a_metric():
    text = text_of(summarise([sent_of(FAST)], LOAD, 0.0), LOAD.percentiles)
    assert "| TTFT: first token | 100.0 | 100.0 | 100.0 | 100.0 |" in text
    assert "| good requests a second | 3.33 |" in text


def test_run_without_an_answer_is_told_all_the_same():
    text = text_of(summarise([sent_of(None, "refused")], LOAD, 0.0), LOAD.percentiles)
    assert "| failed | 1 |" in text
    assert "refused" in text
    assert "TTFT" not in text


def test_answer_of_one_token_has_no_time_between_tokens():
    record = summarise([sent_of(answer(0.0, (0.1,), 0.2, 1))], LOAD, 0.0)
    assert "mean_tpot_ms" not in record
    assert record["good"] == 1


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (50, 2.5), (90, 3.7), (100, 4.0)])
def test_percentiles_interpolate(share, value):
    assert percentile([1.0, 2.0, 3.0, 4.0], share) == pytest.approx(value)


def test_request_that_begins_as_another_ends_is_not_beside_it():
    one, other = answer(0.0, (0.5,), 1.0, 1), answer(1.0, (1.5,), 2.0, 1)
    assert most_at_once([one, other]) == 1


def test_picture_is_svg_and_holds_all_tokens():
    root = ElementTree.fromstring(picture([FAST, SLOW], "a < b & c"))
    assert root.tag.endswith("svg")
    assert "a < b & c" in "".join(root.itertext())
    points = token_rate([FAST, SLOW], 0.0, 1.1)
    width_s = points[1][0] - points[0][0]
    assert sum(rate * width_s for _, rate in points) == pytest.approx(6)


def scripted(status: int = 200) -> FastAPI:
    """A server that answers with as many tokens as asked for, and counts what is open at once."""
    app = FastAPI()
    app.state.bodies, app.state.keys, app.state.most_open, app.state.num_open = [], [], 0, 0

    @app.get("/v1/models")
    async def models():
        return {"data": [{"id": "served"}]}

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def complete(request: Request):
        body = await request.json()
        app.state.bodies.append(body)
        app.state.keys.append(request.headers.get("authorization"))
        if status != 200:
            return JSONResponse({"error": {"message": "too busy"}}, status)
        app.state.num_open += 1
        app.state.most_open = max(app.state.most_open, app.state.num_open)

        async def stream():
            for _ in range(body["max_tokens"]):
                yield 'data: {"choices": [{"text": "a", "delta": {"content": "a"}}]}\n\n'
            yield "data: [DONE]\n\n"
            app.state.num_open -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def bench(url: str, *flags: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", "serve", "--base-url", url, *SHORT, *flags])
    return left.value.code


def test_load_is_put_on_and_reported(tmp_path, capsys):
    app, file, svg = scripted(), tmp_path / "o.json", tmp_path / "p.svg"
    with real_server(app) as url:
        flags = ["--num-warmups", "2", "--api-key", "k", "--output-json", str(file)]
        assert bench(url + "/v1", *flags, "--plot", str(svg), "--random-prefix-len", "3") == 0
    assert len(app.state.bodies) == 8
    assert app.state.keys == ["Bearer k"] * 8
    assert len({tuple(body["prompt"][:3]) for body in app.state.bodies}) == 1
    record = json.loads(file.read_text())
    assert (record["model"], record["completed"], record["failed"]) == ("served", 6, 0)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (48, 24)
    assert ElementTree.fromstring(svg.read_text()).tag.endswith("svg")
    assert "| answered | 6 |" in capsys.readouterr().out


def test_cap_on_open_requests_is_kept():
    app = scripted()
    with real_server(app) as url:
        assert bench(url, "--max-concurrency", "2", "--num-warmups", "0") == 0
    assert 1 <= app.state.most_open <= 2


def test_chat_is_measured_too(capsys):
    with real_server(scripted()) as url:
        assert bench(url, "--endpoint", "/v1/chat/completions", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total_output_tokens"] == 24


def test_refusals_are_counted_and_shown(capsys):
    with real_server(scripted(503)) as url:
        assert bench(url, "--num-warmups", "0") == 1
    out = capsys.readouterr().out
    assert "| failed | 6 |" in out
    assert "answered 503" in out


def test_warm_up_that_fails_ends_it(capsys):
    with real_server(scripted(503)) as url:
        assert bench(url) == 1
    assert "no request of the warm-up succeeded: answered 503" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--goodput", "itl:5"], "METRIC is ttft"),
        (["--goodput", "ttft:-5"], "not above 0"),
        (["--request-rate", "0"], "is no rate"),
        (["--burstiness", "inf"], "not above 0"),
        (["--random-range-ratio", "1"], "not from 0 up to 1"),
        (["--metric-percentiles", "99,101"], "not from 0 to 100"),
        (["--extra-body", "[]"], "no JSON object"),
        (["--extra-body", "{"], "is not JSON"),
    ],
)
def test_flag_that_cannot_be_meant_is_a_usage_error(flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(["bench", "serve", *flags])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_our_own_server_is_measured(capsys):
    context = make_context(FakeEngine(says("Hello, hello")))
    with real_server(create_app(context, ServerSettings())) as url:
        flags = ["--vocab-size", str(context.vocab_size), "--json", "--no-ignore-eos"]
        assert bench(url, *flags) == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 6


def test_help_costs_neither_torch_nor_httpx():
    code = (
        "import sys, app.cli; app.cli.build_parser().format_help(); "
        "sys.exit('torch' in sys.modules or 'httpx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
