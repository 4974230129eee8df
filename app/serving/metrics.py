"""Counters and histograms of requests, and the engine's own numbers, for Prometheus.

Names and meanings are vLLM's, so that its dashboards work. Labels are bounded: the model's name
and closed sets.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.client import EngineStats

_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
_BETWEEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5),
)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class RequestMetrics:
    """Everything that /metrics shows of one model, in a registry of its own."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats))
        labels = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(
                f"vllm:{name}", text, labels, registry=self.registry, buckets=buckets
            )
            return metric.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, labels, registry=self.registry).labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of all requests.")
        self.generation_tokens = counter("generation_tokens", "Tokens given out.")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Between tokens of one choice.", _BETWEEN
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE
        )
        self.prompt_len = histogram("request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self.output_len = histogram(
            "request_generation_tokens", "Tokens given out to one choice.", _LENGTHS
        )
        self._model_name = model_name
        self._ends = Counter(
            "vllm:request_success",
            "Choices that ended, by reason.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )

    def count_end(self, reason: str) -> None:
        self._ends.labels(self._model_name, reason).inc()

    def render(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)


class ChoiceTimer:
    """Times the tokens of one choice."""

    def __init__(self, metrics: RequestMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._last_s: float | None = None
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """Take note of tokens that came together."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._last_s is None:
            self._metrics.first_token.observe(now - self._arrival_s)
        else:
            self._metrics.between_tokens.observe((now - self._last_s) / num_tokens)
        self._last_s = now
        self._num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)

    def end(self, reason: str) -> None:
        self._metrics.count_end(reason)
        self._metrics.output_len.observe(self._num_tokens)
        self._metrics.whole.observe(time.monotonic() - self._arrival_s)


class _EngineCollector(Collector):
    """Reads the engine's snapshot whenever somebody looks."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._labels = [model_name]
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        used = stats.num_blocks - stats.num_free_blocks
        yield self._gauge("num_requests_running", "Sequences running.", stats.num_requests_running)
        yield self._gauge("num_requests_waiting", "Sequences waiting.", stats.num_requests_waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Share of K/V blocks in use, 0 to 1.",
            used / stats.num_blocks if stats.num_blocks else 0.0,
        )  # fmt: skip
        yield self._counter("num_preemptions", "Preemptions.", stats.num_preemptions)
        yield self._counter(
            "prefix_cache_queries", "Tokens looked up in the cache.", stats.prefix_cache_queries
        )
        yield self._counter(
            "prefix_cache_hits", "Tokens found in the cache.", stats.prefix_cache_hits
        )
        yield self._counter(
            "spec_decode_num_drafts", "Times a choice guessed ahead.", stats.num_drafts
        )
        yield self._counter(
            "spec_decode_num_draft_tokens", "Tokens guessed.", stats.num_draft_tokens
        )
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Guesses that were right.", stats.num_accepted_tokens
        )
        yield self._counter("engine_steps", "Steps launched.", stats.num_steps)
        yield self._counter("failed_steps", "Steps that broke.", stats.num_failed_steps)
        yield self._counter(
            "isolated_sequences", "Ended for a step or a row that broke.", stats.num_isolated
        )
        yield self._counter("engine_recoveries", "Workers rebuilt.", stats.num_recoveries)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        metric.add_metric(self._labels, value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        metric.add_metric(self._labels, value)
        return metric
