"""The table in Markdown: medians over rounds, the spread, ratios within a class, and the absent."""

import statistics
from collections.abc import Sequence

from app.bench.peer import Peer
from app.bench.rounds import Results
from app.bench.workload import METRICS, Metric


def markdown(title: str, peers: Sequence[Peer], results: Results) -> str:
    """Return one model's table: a row a peer, then ours over the best peer of as many bits."""
    lines = [f"### {title}", ""]
    lines.append(_row(["server", *(metric.title for metric in METRICS)]))
    lines.append(_row(["---"] * (len(METRICS) + 1)))
    for peer in peers:
        turns = results.turns.get(peer.name, [])
        if turns:
            name = f"**{peer.name}**" if peer.is_ours else peer.name
            lines.append(_row([name, *(_cell(metric, turns) for metric in METRICS)]))
    for peer in peers:
        if peer.is_ours and peer.name in results.turns:
            rivals = [rival for rival in peers if rival.bits == peer.bits and not rival.is_ours]
            ratios = [_ratio(metric, peer, rivals, results) for metric in METRICS]
            if any(ratios):
                lines.append(_row([f"{peer.name} / best {peer.bits}-bit peer", *ratios]))
    lines.append("")
    lines += [f"{name} has no figures or not all: {why}" for name, why in results.faults.items()]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _values(metric: Metric, turns: list[dict[str, float]]) -> list[float]:
    return [turn[metric.key] for turn in turns if metric.key in turn]


def _cell(metric: Metric, turns: list[dict[str, float]]) -> str:
    values = _values(metric, turns)
    if not values:
        return "–"
    low, mid, high = (
        f"{value:,.{metric.num_decimals}f}"
        for value in (min(values), statistics.median(values), max(values))
    )
    return mid if len(values) == 1 else f"{mid} ({low}–{high})"


def _ratio(metric: Metric, ours: Peer, rivals: list[Peer], results: Results) -> str:
    own = _values(metric, results.turns[ours.name])
    medians = [
        statistics.median(values)
        for rival in rivals
        if (values := _values(metric, results.turns.get(rival.name, [])))
    ]
    if not own or not medians:
        return ""
    best = max(medians) if metric.is_rate else min(medians)
    return f"{statistics.median(own) / best:.2f}"
