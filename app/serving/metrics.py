"""Counters and histograms of requests, and the engine's own numbers, for Prometheus.

Names and meanings are vLLM's where it has them, so that its dashboards and the routers that read
it work; what it lacks is under `arriero:`. Labels are bounded: the model's name and closed sets.
What is counted is kept in plain numbers and put into Prometheus' form when somebody asks.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from app.engine.client import EngineClient, EngineStats
from app.engine.measures import Histogram
from app.engine.timeline import Timeline
from app.serving.energy import GpuMeter

_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
_BETWEEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5),
)
_PHASE = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30),
    *(40, 50, 60, 120, 240, 480, 960),
)

_HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between tokens of one choice.", _BETWEEN),
    "request_time_per_output_token_seconds": ("The same, a choice's mean.", _BETWEEN),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _PHASE),
    "request_queue_time_seconds": ("From arrival to the first step.", _PHASE),
    "request_prefill_time_seconds": ("From the first step to the first token.", _PHASE),
    "request_decode_time_seconds": ("From the first token to the last.", _PHASE),
    "request_inference_time_seconds": ("From the first step to the last token.", _PHASE),
    "request_prompt_tokens": ("Tokens of a prompt.", _LENGTHS),
    "request_generation_tokens": ("Tokens given out to one choice.", _LENGTHS),
    "request_params_n": ("Choices asked for.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("Tokens asked for.", _LENGTHS),
}


class RequestMetrics:
    """Everything that /metrics shows of one model. Used on the event loop only."""

    def __init__(self, model_name: str, engine: EngineClient, gpus: GpuMeter | None = None) -> None:
        self.model_name = model_name
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.ends = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.errors: dict[str, int] = {}
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.between_tokens = self.histograms["inter_token_latency_seconds"]  # once a token
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(self, engine, gpus))
        ProcessCollector(registry=self.registry)

    def observe(self, name: str, value: float) -> None:
        """Put a value into one of the histograms."""
        self.histograms[name].observe(value)

    def count_prompt(self, num_tokens: int, num_choices: int, max_tokens: int) -> None:
        """Take note of a prompt that was let in."""
        self.num_prompt_tokens += num_tokens
        self.observe("request_prompt_tokens", num_tokens)
        self.observe("request_params_n", num_choices)
        self.observe("request_params_max_tokens", max_tokens)

    def count_error(self, code: str) -> None:
        """Take note of a request that was answered with an error, by the error's own code."""
        self.errors[code] = self.errors.get(code, 0) + 1

    def render(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self.registry)


class ChoiceTimer:
    """Times the tokens of one choice."""

    __slots__ = (
        *("_arrival_s", "_choice", "_first_s", "_is_over", "_last_s"),
        *("_metrics", "_num", "_timeline"),
    )

    def __init__(
        self, metrics: RequestMetrics, arrival_s: float, timeline: Timeline, choice: int
    ) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._timeline = timeline
        self._choice = choice
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num = 0
        self._is_over = False

    def add(self, num_tokens: int) -> None:
        """Take note of tokens that came together."""
        if not num_tokens:
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            self._metrics.observe("time_to_first_token_seconds", now - self._arrival_s)
        else:
            self._metrics.between_tokens.observe((now - self._last_s) / num_tokens)
        self._last_s = now
        self._num += num_tokens
        self._metrics.num_generation_tokens += num_tokens

    def end(self, reason: str) -> None:
        """Take note of the end, and of the phases that it closes; the first time counts."""
        if self._is_over:
            return
        self._is_over = True
        metrics = self._metrics
        metrics.ends[reason] += 1
        metrics.observe("request_generation_tokens", self._num)
        metrics.observe("e2e_request_latency_seconds", time.monotonic() - self._arrival_s)
        admitted_s = self._timeline.first("admitted", self._choice)
        if admitted_s is None:
            return
        metrics.observe("request_queue_time_seconds", admitted_s - self._arrival_s)
        if self._first_s is None:
            return
        metrics.observe("request_prefill_time_seconds", self._first_s - admitted_s)
        metrics.observe("request_decode_time_seconds", self._last_s - self._first_s)
        metrics.observe("request_inference_time_seconds", self._last_s - admitted_s)
        if self._num > 1:
            mean_s = (self._last_s - self._first_s) / (self._num - 1)
            metrics.observe("request_time_per_output_token_seconds", mean_s)


class _Collector(Collector):
    """Puts numbers into Prometheus' form whenever somebody looks."""

    def __init__(
        self, metrics: RequestMetrics, engine: EngineClient, gpus: GpuMeter | None
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._gpus = gpus
        self._model = metrics.model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield from self._requests()
        yield from self._load(stats)
        yield from self._steps(stats)
        yield from self._health()
        if self._gpus is not None:
            yield from self._gpus.collect()

    def _requests(self) -> Iterator[Metric]:
        metrics = self._metrics
        for name, (text, _) in _HISTOGRAMS.items():
            yield self._histogram(f"vllm:{name}", text, metrics.histograms[name])
        # Its name until vLLM 0.12; many boards still ask for it.
        yield self._histogram(
            "vllm:time_per_output_token_seconds", "The same as inter_token_latency_seconds.",
            metrics.between_tokens,
        )  # fmt: skip
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", metrics.num_prompt_tokens)
        yield self._counter(
            "vllm:generation_tokens", "Tokens given out.", metrics.num_generation_tokens
        )
        yield self._by(
            "vllm:request_success", "Choices that ended, by reason.", "finished_reason",
            metrics.ends.items(),
        )  # fmt: skip
        yield self._by(
            "arriero:request_errors", "Requests answered with an error, by its code.", "code",
            sorted(metrics.errors.items()),
        )  # fmt: skip

    def _load(self, stats: EngineStats) -> Iterator[Metric]:
        limits = self._engine.limits
        used = stats.num_blocks - stats.num_free_blocks
        share = used / stats.num_blocks if stats.num_blocks else 0.0
        text = "Share of K/V blocks in use, 0 to 1."
        yield self._gauge(
            "vllm:num_requests_running", "Sequences running.", stats.num_requests_running
        )
        yield self._gauge(
            "vllm:num_requests_waiting", "Sequences waiting.", stats.num_requests_waiting
        )
        yield self._gauge("vllm:kv_cache_usage_perc", text, share)
        yield self._gauge("vllm:gpu_cache_usage_perc", text, share)  # its name before vLLM 0.9
        yield self._gauge(
            "arriero:max_num_seqs", "Sequences that can run at once.", limits.max_num_seqs
        )
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The K/V pool.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )  # fmt: skip
        info.add_metric([self._model, str(limits.block_size), str(limits.num_blocks)], 1)
        yield info
        yield self._counter(
            "vllm:prefix_cache_queries", "Tokens looked up.", stats.prefix_cache_queries
        )
        yield self._counter("vllm:prefix_cache_hits", "Tokens found.", stats.prefix_cache_hits)
        yield self._by(
            "vllm:admission_rejections", "Requests refused for what waits already.", "reason",
            [
                ("max_num_queued_reqs", stats.num_refused_seqs),
                ("max_num_queued_tokens", stats.num_refused_tokens),
            ],
        )  # fmt: skip

    def _steps(self, stats: EngineStats) -> Iterator[Metric]:
        measures = self._engine.measures
        yield self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", measures.step_tokens
        )
        yield self._histogram("arriero:step_seconds", "Time of a step.", measures.step_seconds)
        yield self._histogram("arriero:step_seqs", "Sequences in a step.", measures.step_seqs)
        for name, text, value in (
            ("vllm:num_preemptions", "Preemptions.", stats.num_preemptions),
            ("vllm:spec_decode_num_drafts", "Times a choice guessed ahead.", stats.num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", stats.num_draft_tokens),
            (
                "vllm:spec_decode_num_accepted_tokens",
                "Guesses that were right.",
                stats.num_accepted_tokens,
            ),
            ("arriero:engine_steps", "Steps launched.", stats.num_steps),
            ("arriero:failed_steps", "Steps that broke.", stats.num_failed_steps),
            ("arriero:isolated_sequences", "Ended for breaking steps.", stats.num_isolated),
            ("arriero:engine_recoveries", "Workers rebuilt.", stats.num_recoveries),
        ):
            yield self._counter(name, text, value)

    def _health(self) -> Iterator[Metric]:
        engine = self._engine
        is_ready = engine.is_alive and engine.stuck_for < 1 and not engine.is_draining
        yield self._gauge("arriero:ready", "1 while requests are taken.", int(is_ready))
        yield self._gauge(
            "arriero:step_overdue", "Time of this step over what is suspicious: stuck above 1.",
            engine.stuck_for,
        )  # fmt: skip

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(name, text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(name, text, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _by(self, name: str, text: str, label: str, values: Iterable[tuple[str, int]]) -> Metric:
        metric = CounterMetricFamily(name, text, labels=["model_name", label])
        for key, value in values:
            metric.add_metric([self._model, key], value)
        return metric

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        metric = HistogramMetricFamily(name, text, labels=["model_name"])
        names = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
        buckets = list(zip(names, accumulate(histogram.counts), strict=True))
        metric.add_metric([self._model], buckets, histogram.total)
        return metric
