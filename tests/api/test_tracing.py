"""Spans of requests, as a collector that speaks OTLP over HTTP gets them."""

import asyncio
import contextlib
import dataclasses
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from app.factory import create_app
from app.serving.tracing import collector_url, open_tracer
from app.settings import ApiKey, ServerSettings
from model.errors import ConfigError
from tests.api.serve import events, run
from tests.fake_engine import FakeEngine, make_context, says

COMPLETIONS = "/v1/completions"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


class Collector:
    """Takes spans over OTLP/HTTP, once its gate is open."""

    def __init__(self) -> None:
        self.spans: list = []
        self.resources: list[dict] = []
        self.gate = threading.Event()
        self.gate.set()
        self.was_asked = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.was_asked.set()
                collector.gate.wait()
                collector.take(self.path, body)
                with contextlib.suppress(OSError):  # who was here has gone
                    self.send_response(200)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Keep quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            self.resources.append(values_of(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def named(self, name: str) -> list:
        return [span for span in self.spans if span.name == name]

    @property
    def request(self):
        """The span of the only request."""
        (span,) = self.named("llm_request")
        return span


def values_of(attributes) -> dict[str, object]:
    found: dict[str, object] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        found[attribute.key] = (
            [each.string_value for each in value.values] if kind == "array_value" else value
        )
    return found


@pytest.fixture
def collector():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otlp")
    collector = Collector()
    yield collector
    collector.close()


@contextlib.asynccontextmanager
async def traced(collector: Collector, engine: FakeEngine, **settings):
    """A client of an application that sends its spans; all are there at the end."""
    tracer = open_tracer(collector.url, "fake", "1.2")
    context = dataclasses.replace(make_context(engine), tracer=tracer)
    transport = httpx.ASGITransport(app=create_app(context, ServerSettings(**settings)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await tracer.close(30.0)
    context.grammars.close()


def test_a_request_is_a_span_under_its_callers_with_vllms_attributes(collector):
    async def scenario():
        async with traced(collector, FakeEngine(says("secret"))) as client:
            headers = {**PARENT, "tracestate": "vendor=1", "x-request-id": "mine"}
            body = {"prompt": "ab", "n": 2, "temperature": 0.5, "top_p": 0.25, "max_tokens": 3}
            return await client.post(COMPLETIONS, json=body, headers=headers)

    response = asyncio.run(scenario())
    span = collector.request
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.trace_state == "vendor=1"
    assert response.headers["traceparent"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
    values = values_of(span.attributes)
    latencies = {name: values.pop(name) for name in list(values) if ".latency." in name}
    assert values == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.response.model": "fake",
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.completion_tokens": 6,
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": 3,
    }
    assert {name.removeprefix("gen_ai.latency.") for name in latencies} == {
        *("e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill"),
        *("time_in_model_decode", "time_in_model_inference"),
    }
    assert all(0 <= seconds <= latencies["gen_ai.latency.e2e"] for seconds in latencies.values())
    names = [event.name for event in span.events]
    assert sorted(names) == sorted(["queued", "admitted", "first_token", "done"] * 2)
    assert collector.resources[0]["service.name"] == "arriero"
    assert b"secret" not in b"".join(each.SerializeToString() for each in collector.spans)


def test_phases_are_children_that_follow_one_another(collector):
    async def scenario():
        async with traced(collector, FakeEngine(says("abc"))) as client:
            body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
            response = await client.post("/v1/chat/completions", json=body)
            assert events(response.text)
            assert int(response.headers["traceparent"][-2:], 16) & 1  # sampled

    run(scenario())
    span = collector.request
    assert not span.parent_span_id
    phases = [collector.named(name) for name in ("queue", "prefill", "decode")]
    (queue,), (prefill,), (decode,) = phases
    for phase in (queue, prefill, decode):
        assert (phase.parent_span_id, phase.trace_id) == (span.span_id, span.trace_id)
    times = [span.start_time_unix_nano]
    times += [queue.start_time_unix_nano, queue.end_time_unix_nano]
    times += [prefill.start_time_unix_nano, prefill.end_time_unix_nano]
    times += [decode.start_time_unix_nano, decode.end_time_unix_nano, span.end_time_unix_nano]
    assert times == sorted(times)
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano


@pytest.mark.parametrize("key", [None, "again"])
@pytest.mark.parametrize(
    ("body", "error", "expected", "is_fault"),
    [
        ({"prompt": "x", "model": "none"}, None, "model_not_found", False),
        ({"prompt": 7}, None, "invalid_request_error", False),
        ({"prompt": "x"}, "the step broke", "engine_error", True),
        ({"prompt": "x", "stream": True}, "the step broke", "engine_error", True),
    ],
)
def test_a_failure_is_told_and_only_ours_is_an_error(
    collector, body, error, expected, is_fault, key
):
    engine = FakeEngine(says("x"))
    engine.error = error
    headers = {"idempotency-key": key} if key else {}

    async def scenario():
        async with traced(collector, engine) as client:
            response = await client.post(COMPLETIONS, json=body, headers=headers)
            assert "traceparent" in response.headers

    run(scenario())
    assert values_of(collector.request.attributes)["error.type"] == expected
    assert (collector.request.status.code == 2) == is_fault


def test_a_client_that_goes_ends_its_span(collector):
    engine = FakeEngine(says("x"))
    engine.gate.clear()

    async def scenario():
        async with traced(collector, engine) as client:
            asking = asyncio.ensure_future(client.post(COMPLETIONS, json={"prompt": "x"}))
            while not engine.streams:
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    run(scenario())
    values = values_of(collector.request.attributes)
    assert values["gen_ai.response.finish_reasons"] == ["abort"]
    assert "error.type" not in values
    assert not collector.named("decode")


def test_a_repeated_request_has_a_span_of_its_own(collector):
    async def scenario():
        async with traced(collector, FakeEngine(says("x"))) as client:
            headers = {"idempotency-key": "again"}
            answers = [
                await client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
                for _ in range(2)
            ]
            return [answer.headers["traceparent"].split("-")[2] for answer in answers]

    ids = asyncio.run(scenario())
    spans = collector.named("llm_request")
    assert sorted(span.span_id.hex() for span in spans) == sorted(ids)
    (first,) = [span for span in spans if span.span_id.hex() == ids[0]]
    assert values_of(first.attributes)["gen_ai.usage.completion_tokens"] == 2
    assert len(collector.named("decode")) == 1


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "rubbish")],
        [("traceparent", f"00-{'0' * 32}-{PARENT_ID}-01")],
        [("traceparent", PARENT["traceparent"]), ("traceparent", PARENT["traceparent"])],
        [("traceparent", "\xff" * 55)],
    ],
)
def test_a_context_that_is_none_begins_a_trace(collector, headers):
    async def scenario():
        async with traced(collector, FakeEngine(says("x"))) as client:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
            response = await client.post(COMPLETIONS, json={"prompt": "x"}, headers=raw)
            assert response.status_code == 200

    run(scenario())
    assert not collector.request.parent_span_id
    assert collector.request.trace_id.hex() != TRACE_ID


def test_what_the_caller_does_not_sample_is_not_sent(collector):
    async def scenario():
        async with traced(collector, FakeEngine(says("x"))) as client:
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
            response = await client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)
            assert response.headers["traceparent"].startswith(f"00-{TRACE_ID}-")
            assert response.headers["traceparent"].endswith("-00")

    run(scenario())
    assert collector.spans == []


def test_who_has_no_key_makes_no_span_and_who_has_one_is_named(collector):
    async def scenario():
        keys = (ApiKey(name="alice", key="a"),)
        async with traced(collector, FakeEngine(says("x")), named_keys=keys) as client:
            stranger = await client.post(COMPLETIONS, json={"prompt": "x"}, headers=PARENT)
            assert stranger.status_code == 401
            assert "traceparent" not in stranger.headers
            headers = {"authorization": "Bearer a"}
            await client.post(COMPLETIONS, json={"prompt": "x"}, headers=headers)

    run(scenario())
    assert values_of(collector.request.attributes)["arriero.key_name"] == "alice"


def test_a_collector_that_hangs_holds_up_neither_answers_nor_the_end(collector):
    collector.gate.clear()

    async def scenario():
        tracer = open_tracer(collector.url, "fake", "1.2")
        context = dataclasses.replace(make_context(FakeEngine(says("x"))), tracer=tracer)
        transport = httpx.ASGITransport(app=create_app(context, ServerSettings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post(COMPLETIONS, json={"prompt": "x"})
            assert response.status_code == 200
        closing = asyncio.ensure_future(tracer.close(0.2))
        assert await asyncio.to_thread(collector.was_asked.wait, 30)
        await closing
        assert not collector.gate.is_set()  # it still hangs
        context.grammars.close()

    run(scenario())
    assert collector.spans == []


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch):
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk"):
        open_tracer("http://127.0.0.1:4318", "fake", "1.2")


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c/", "https://c/v1/traces"),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
        ("http://c/otlp?x=1", "http://c/otlp?x=1"),
    ],
)
def test_spans_are_posted_to_the_conventional_path_or_the_named_one(endpoint, url):
    assert collector_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint", ["grpc://c:4317", "http://c:4317", "c:4318", "http://c:port", "http://", ""]
)
def test_an_endpoint_that_takes_no_spans_is_refused(endpoint):
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        collector_url(endpoint)
