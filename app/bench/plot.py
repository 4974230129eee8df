"""A run of `arriero bench serve` as a picture: tokens a second, requests open, time to first token.

Plain SVG, written here: three charts over the seconds of the run, one below the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from app.bench.client import Completion
from app.bench.figures import openings

WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 130, 70, 50, 55
NUM_BINS = 120
Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One of the charts: a line through its points, or dots."""

    title: str
    points: list[Point]
    is_line: bool


def picture(answers: Sequence[Completion], title: str) -> str:
    """Return the SVG of a run with at least one answer."""
    begun_s = min(answer.started_s for answer in answers)
    seconds = max(answer.ended_s for answer in answers) - begun_s
    charts = [
        Chart(title="tokens a second", points=token_rate(answers, begun_s, seconds), is_line=True),
        Chart(title="requests open", points=open_requests(answers, begun_s), is_line=True),
        Chart(
            title="time to first token, ms, by start",
            points=[
                (answer.started_s - begun_s, 1000 * answer.first_token_delay_s)
                for answer in answers
            ],
            is_line=False,
        ),
    ]
    height = TOP + len(charts) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEFT + 30}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for number, chart in enumerate(charts):
        parts += _drawn(chart, TOP + number * (HEIGHT + GAP), seconds)
    return "\n".join([*parts, "</svg>"]) + "\n"


def token_rate(answers: Sequence[Completion], begun_s: float, seconds: float) -> list[Point]:
    """Return tokens a second over the run, in bins; a piece of text counts its share of tokens."""
    width_s = max(seconds, 1e-9) / NUM_BINS
    bins = [0.0] * NUM_BINS
    for answer in answers:
        arrivals_s = answer.arrivals_s or (answer.ended_s,)
        for instant_s in arrivals_s:
            place = min(NUM_BINS - 1, int((instant_s - begun_s) / width_s))
            bins[place] += answer.num_output_tokens / len(arrivals_s)
    return [((place + 0.5) * width_s, count / width_s) for place, count in enumerate(bins)]


def open_requests(answers: Sequence[Completion], begun_s: float) -> list[Point]:
    """Return how many requests were open, a point before and after each change."""
    points, now = [(0.0, 0.0)], 0
    for instant_s, change in openings(answers):
        points.append((instant_s - begun_s, float(now)))
        now += change
        points.append((instant_s - begun_s, float(now)))
    return points


def _drawn(chart: Chart, top: int, seconds: float) -> list[str]:
    highest = max((y for _, y in chart.points), default=0.0) or 1.0
    bottom = top + HEIGHT

    def place(point: Point) -> str:
        x = LEFT + WIDTH * point[0] / max(seconds, 1e-9)
        return f"{x:.1f},{bottom - HEIGHT * point[1] / highest:.1f}"

    parts = [f'<text x="{LEFT}" y="{top - 8}">{escape(chart.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = bottom - HEIGHT * share
        parts += [
            f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + WIDTH}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{highest * share:,.4g}</text>',
            f'<text x="{LEFT + WIDTH * share:.0f}" y="{bottom + 16}" text-anchor="middle">'
            f"{seconds * share:.3g} s</text>",
        ]
    if chart.is_line:
        path = " ".join(place(point) for point in chart.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb"/>')
        return parts
    for point in chart.points:
        across, down = place(point).split(",")
        parts.append(
            f'<circle cx="{across}" cy="{down}" r="2.5" fill="#1f6feb" fill-opacity="0.6"/>'
        )
    return parts
