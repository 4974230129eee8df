"""What a load on a server amounts to, under the names of `vllm bench serve`'s JSON.

TTFT is from the request to its first text; TPOT the mean time of a token after that; ITL each gap
between two pieces of text; E2EL the whole. All in milliseconds.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from app.bench.client import Completion
from app.bench.load import Sent
from app.bench.report import Record

METRICS = {"ttft": "first token", "tpot": "per token after it", "itl": "between two", "e2el": "all"}
SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load as it was asked for, in the words of the report."""

    request_rate: float
    max_concurrency: int | None
    percentiles: tuple[float, ...]
    goodput_ms: Mapping[str, float]  # by metric, what a good request stays within


def ttft_ms(answer: Completion) -> float:
    return 1000 * answer.first_token_delay_s


def e2el_ms(answer: Completion) -> float:
    return 1000 * (answer.ended_s - answer.started_s)


def tpot_ms(answer: Completion) -> float | None:
    """Return None for an answer of one token: it has none after the first."""
    if answer.num_output_tokens < 2:
        return None
    seconds = answer.last_token_s - answer.first_token_s
    return 1000 * seconds / (answer.num_output_tokens - 1)


def itls_ms(answer: Completion) -> list[float]:
    arrivals_s = answer.arrivals_s
    return [1000 * (later - earlier) for earlier, later in pairwise(arrivals_s)]


def summarise(sent: Sequence[Sent], load: Load, client_cpu_s: float) -> Record:
    """Return all figures of a run as one record."""
    answers = [each.completion for each in sent if each.completion is not None]
    faults = sorted({each.fault for each in sent if each.fault is not None})
    record: Record = {
        "kind": "serve",
        "request_rate": load.request_rate if load.request_rate < float("inf") else "inf",
        "max_concurrency": load.max_concurrency,
        "completed": len(answers),
        "failed": len(sent) - len(answers),
        "fault": faults[0] if faults else None,
    }
    if not answers:
        return record
    begun_s = min(answer.started_s for answer in answers)
    duration_s = max(answer.ended_s for answer in answers) - begun_s
    num_input = sum(
        each.completion.num_prompt_tokens or each.draft.num_input
        for each in sent
        if each.completion is not None
    )
    num_output = sum(answer.num_output_tokens for answer in answers)
    starts = [each.completion.started_s - each.due_s for each in sent if each.completion]
    record |= {
        "duration": duration_s,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(answers) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_concurrent_requests": most_at_once(answers),
        # Of requests that wait for their turn under a cap, the wait is no part of their TTFT.
        "max_start_delay_ms": 1000 * max(starts),
        "client_cpu_share": client_cpu_s / duration_s,
    }
    if load.goodput_ms:
        num_good = sum(is_good(answer, load.goodput_ms) for answer in answers)
        record |= {"good": num_good, "request_goodput": num_good / duration_s}
    for metric, values in values_of(answers).items():
        record |= _spread(metric, values, load.percentiles)
    return record


def values_of(answers: Sequence[Completion]) -> dict[str, list[float]]:
    """Return every value of each metric, sorted."""
    tpots = [tpot_ms(answer) for answer in answers]
    values = {
        "ttft": [ttft_ms(answer) for answer in answers],
        "tpot": [tpot for tpot in tpots if tpot is not None],
        "itl": [gap for answer in answers for gap in itls_ms(answer)],
        "e2el": [e2el_ms(answer) for answer in answers],
    }
    return {metric: sorted(each) for metric, each in values.items()}


def is_good(answer: Completion, within_ms: Mapping[str, float]) -> bool:
    """Whether a request kept to all that was promised."""
    measured = {"ttft": ttft_ms(answer), "tpot": tpot_ms(answer) or 0.0, "e2el": e2el_ms(answer)}
    return all(measured[metric] <= limit for metric, limit in within_ms.items())


def most_at_once(answers: Sequence[Completion]) -> int:
    """Return how many requests were open at the busiest moment."""
    most = now = 0
    for _, change in openings(answers):
        now += change
        most = max(most, now)
    return most


def openings(answers: Sequence[Completion]) -> list[tuple[float, int]]:
    """Return the instants at which a request began, with 1, or ended, with -1, in order.

    Of an end and a beginning at one instant, the end comes first.
    """
    return sorted(
        change for each in answers for change in ((each.started_s, 1), (each.ended_s, -1))
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Interpolate between the two nearest of sorted values, as numpy does; share is of 100."""
    place = (len(values) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def _spread(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> Record:
    if not values:
        return {}
    record: Record = {
        f"mean_{metric}_ms": statistics.fmean(values),
        f"median_{metric}_ms": percentile(values, 50),
        f"std_{metric}_ms": statistics.pstdev(values),
    }
    return record | {f"p{share:g}_{metric}_ms": percentile(values, share) for share in percentiles}


def text_of(record: Record, percentiles: Sequence[float]) -> str:
    """Return the figures as two small Markdown tables."""
    lines = ["| | |", "|---|---|"]
    for key, title, form in (
        ("completed", "answered", "d"),
        ("failed", "failed", "d"),
        ("duration", "seconds", ".2f"),
        ("total_input_tokens", "tokens in", ",d"),
        ("total_output_tokens", "tokens out", ",d"),
        ("request_throughput", "requests a second", ".2f"),
        ("output_throughput", "tokens out a second", ",.1f"),
        ("total_token_throughput", "tokens a second in all", ",.1f"),
        ("request_goodput", "good requests a second", ".2f"),
        ("max_concurrent_requests", "at once, at most", "d"),
        ("client_cpu_share", "the client's share of a core", ".0%"),
    ):
        if (value := record.get(key)) is not None:
            lines.append(f"| {title} | {value:{form}} |")
    columns = ["mean", "median", *(f"p{share:g}" for share in percentiles)]
    if record["completed"]:
        lines += ["", f"| ms | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for metric, title in METRICS.items():
        values = [record.get(f"{column}_{metric}_ms") for column in columns]
        if any(value is not None for value in values):
            cells = " | ".join(f"{value:,.1f}" for value in values)
            lines.append(f"| {metric.upper()}: {title} | {cells} |")
    if record.get("fault"):
        lines += ["", f"The first of the failures: {record['fault']}"]
    return "\n".join(lines) + "\n"
