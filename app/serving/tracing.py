"""OpenTelemetry spans of requests, sent to a collector over OTLP/HTTP.

A span `llm_request` a request, its attributes under vLLM's names, with children `queue`, `prefill`
and `decode` that are cut out of the request's timeline, and the timeline's events. No text is in
any of them. Needs the extra `otlp`. The SDK's own thread sends in batches; what it has no room for
is dropped, and the log says so. Its OTEL_* variables hold (service name, headers, sampler, batch).
"""

import asyncio
import logging
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from app.engine.timeline import EventName, TimelineEvent
from app.errors import ServiceError
from app.serving.request_log import RequestRecord
from model.errors import ConfigError
from model.step import SamplingParams

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 3.0  # at shutdown
QUIET_S = 60.0  # a collector that is gone is told of once in so long
_SPOKEN_BY = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
)
_NS = 1_000_000_000


class RequestSpan:
    """The span of one request, from its arrival on. Used on the event loop only.

    It ends with what `finish` or `fail` says first; what comes later is of no account.
    """

    def __init__(self, tracer: "RequestTracer", parent: "Context") -> None:
        from opentelemetry.trace import SpanKind

        self._tracer = tracer
        self._start_ns = time.time_ns()
        self._start_s = time.monotonic()
        self._is_over = False
        self._is_taken = False
        self._span: Span = tracer.tracer.start_span(
            "llm_request", parent, SpanKind.SERVER, start_time=self._start_ns
        )

    def headers(self) -> dict[str, str]:
        """Return the span's context as W3C's header."""
        from opentelemetry.trace import set_span_in_context

        headers: dict[str, str] = {}
        self._tracer.propagator.inject(headers, set_span_in_context(self._span))
        return {name: value for name, value in headers.items() if name == "traceparent"}

    def take(self) -> None:
        """Promise to call `finish`: `close` will not end it any more."""
        self._is_taken = True

    def fail(self, error: ServiceError) -> None:
        """End it for a request that came to no answer, unless it was taken."""
        if not self._is_taken:
            self._end(time.monotonic(), error)

    def close(self, error_code: str | None = None) -> None:
        """End it for a request that has nothing more to say, unless it was taken."""
        if self._is_taken:
            return
        if error_code is not None:
            self._span.set_attribute("error.type", error_code)
        self._end(time.monotonic(), None)

    def finish(
        self,
        record: RequestRecord,
        sampling: SamplingParams,
        reasons: Iterable[str],
        error: ServiceError | None,
    ) -> None:
        """End it with what became of a request."""
        if self._is_over:
            return
        end_s = time.monotonic()
        if self._span.is_recording():
            self._describe(record, sampling)
            self._span.set_attribute("gen_ai.response.finish_reasons", tuple(reasons))
            self._add_phases(record, end_s)
        self._end(end_s, error)

    def _describe(self, record: RequestRecord, sampling: SamplingParams) -> None:
        self._span.set_attributes(
            {
                "gen_ai.response.model": self._tracer.model_name,
                "gen_ai.request.id": record.request_id,
                "gen_ai.request.n": record.num_choices,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.usage.num_sequences": record.num_choices,
                "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
                "gen_ai.usage.completion_tokens": record.num_completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
            }
        )
        if record.tenant:
            self._span.set_attribute("arriero.key_name", record.tenant)

    def _add_phases(self, record: RequestRecord, end_s: float) -> None:
        """Add the events, and the phases of the request as a whole: its first choice to get far."""
        events = record.events()
        for prompt, event in events:
            self._add_event(prompt, event)
        spent = {"e2e": end_s - record.arrival_s}
        admitted_s = _first(events, "admitted")
        self._add_phase("queue", record.arrival_s, end_s if admitted_s is None else admitted_s)
        if admitted_s is not None:
            spent["time_in_queue"] = admitted_s - record.arrival_s
            first_s = _first(events, "first_token")
            self._add_phase("prefill", admitted_s, end_s if first_s is None else first_s)
            if first_s is not None:
                ends = [event.at_s for _, event in events if event.name == "done"]
                last_s = ends[-1] if len(ends) >= record.num_choices else end_s
                self._add_phase("decode", first_s, last_s)
                spent["time_to_first_token"] = first_s - record.arrival_s
                spent["time_in_model_prefill"] = first_s - admitted_s
                spent["time_in_model_decode"] = last_s - first_s
                spent["time_in_model_inference"] = last_s - admitted_s
        self._span.set_attributes(
            {f"gen_ai.latency.{name}": seconds for name, seconds in spent.items()}
        )

    def _add_event(self, prompt: int, event: TimelineEvent) -> None:
        attributes: dict[str, str | int] = {"prompt": prompt, "choice": event.choice}
        if event.name in ("admitted", "prefill"):
            attributes["tokens"] = event.num_tokens
        if event.reason is not None:
            attributes["reason"] = event.reason
        self._span.add_event(event.name, attributes, self._at_ns(event.at_s))

    def _add_phase(self, name: str, start_s: float, end_s: float) -> None:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.tracer.start_span(
            name, set_span_in_context(self._span), start_time=self._at_ns(start_s)
        )
        span.end(self._at_ns(end_s))

    def _end(self, end_s: float, error: ServiceError | None) -> None:
        from opentelemetry.trace import StatusCode

        if self._is_over:
            return
        self._is_over = True
        if error is not None:
            self._span.set_attribute("error.type", error.code or error.type)
            self._span.set_attribute("http.response.status_code", error.status)
            if error.status >= 500:  # as the conventions have it: the client's faults are not ours
                self._span.set_status(StatusCode.ERROR, error.code or error.type)
        self._span.end(self._at_ns(end_s))

    def _at_ns(self, at_s: float) -> int:
        """Return a time of the monotonic clock on the wall's: that of the span's own start."""
        return self._start_ns + round((at_s - self._start_s) * _NS)


@contextmanager
def refusals_noted(span: RequestSpan | None) -> Generator[None, None, None]:
    """Note in a span, if there is one, why a request was refused."""
    try:
        yield
    except ServiceError as error:
        if span is not None:
            span.fail(error)
        raise


def _first(events: Iterable[tuple[int, TimelineEvent]], name: EventName) -> float | None:
    return next((event.at_s for _, event in events if event.name == name), None)


class RequestTracer:
    """Starts spans, and has the SDK send them."""

    def __init__(self, provider: "TracerProvider", model_name: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.model_name = model_name
        self.tracer = provider.get_tracer("arriero")
        self.propagator = TraceContextTextMapPropagator()
        self._provider = provider

    def start(self, headers: Iterable[tuple[bytes, bytes]]) -> RequestSpan:
        """Return the span of a request, under the one that its headers name, if they do.

        `headers` have names in lower case. A context that is malformed or given twice is none.
        """
        given: dict[str, list[str]] = {}
        for name, value in headers:
            if name in (b"traceparent", b"tracestate"):
                given.setdefault(name.decode(), []).append(value.decode("latin-1"))
        if len(given.get("traceparent", ())) > 1:
            given = {}
        from opentelemetry.context import Context

        return RequestSpan(self, self.propagator.extract(given, Context()))

    async def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Send what has not been sent, but take no longer than so."""
        loop = asyncio.get_running_loop()
        is_sent = asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(is_sent.set)
            except RuntimeError:
                return  # too late: the loop has closed

        # Of its own, and a daemon: nothing waits for it at the end of the process.
        threading.Thread(target=flush, name="flush-spans", daemon=True).start()
        try:
            await asyncio.wait_for(is_sent.wait(), timeout_s)
        except TimeoutError:
            logger.warning("the last spans were not sent: the collector took over %g s", timeout_s)


def open_tracer(endpoint: str, model_name: str, version: str) -> RequestTracer:
    """Return a tracer that sends to a collector, whether it is there or not. Raises ConfigError."""
    url = collector_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry ({error.name} is not installed): "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from error
    own = Resource.create({"service.name": "arriero", "service.version": version})
    resource = own.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    for name in _SPOKEN_BY:
        logging.getLogger(name).addFilter(_Seldom())
    logger.info("spans go to %s", url)
    return RequestTracer(provider, model_name)


def collector_url(endpoint: str) -> str:
    """Return where spans are posted; /v1/traces where only a host is named. Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--otlp-traces-endpoint {endpoint}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 4317:
        raise ConfigError(
            f"--otlp-traces-endpoint {endpoint}: spans are sent over HTTP, not gRPC; "
            f"name the collector's HTTP port: http://{parts.hostname or 'localhost'}:4318/v1/traces"
        )
    return endpoint if parts.path.strip("/") else parts._replace(path="/v1/traces").geturl()


class _Seldom(logging.Filter):
    """Lets a message through only once in a while."""

    def __init__(self) -> None:
        super().__init__()
        self._last_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = time.monotonic()
        if now_s - self._last_s.get(record.msg, -QUIET_S) < QUIET_S:
            return False
        self._last_s[record.msg] = now_s
        return True
