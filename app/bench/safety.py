"""What protection costs: CPU time a token with all of it on, and with all of it off.

    scripts/bench-safety                16 chat streams of 1,000 tokens, 9 rounds

Servers run at once over a runner that only keeps time, and are loaded in turn. *On*: two keys
with weights and quotas whose streams compete for fair shares, deadlines, caps on connections, the
bounded queue, the watchdog, as they are shipped. *Off*: no key, no deadline, no cap, no bound, no
shares, no watchdog. Another that is on has an `Idempotency-Key` with each stream: its events have
ids, its tokens are logged and its answer is kept.

Two processes that do the same may differ for as long as they live: where objects lie in memory and
how strings are hashed is drawn at their start. So each round has servers of its own.
"""

import argparse
import asyncio
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack

from app.api.connections import EdgeConfig
from app.bench.host import flags, load, measure, start_server
from app.engine.admission import Admission
from app.engine.client import EngineClient
from app.engine.collector import settle_collector
from app.engine.engine import Engine
from app.engine.fairness import FairShares
from app.factory import create_app
from app.logs import set_up_logging
from app.main import DrainingServer, bind, make_context
from app.settings import ApiKey, ServerSettings

SIDES = ("off", "on", "on, with keys to repeat")
ORDERS = tuple(itertools.permutations(SIDES))
NUM_LOADS = 6  # of each server; the first warms it up
NO_BOUND = 1 << 60
KEYS = tuple(
    ApiKey(
        name=name,
        key=f"key-of-{name}",
        weight=weight,
        requests_per_minute=1_000_000,
        tokens_per_minute=1_000_000_000,
        max_concurrent=1000,
        cache_salt=name,
    )
    for name, weight in (("alice", 1.0), ("bob", 2.0))
)


def unprotected(settings: ServerSettings) -> ServerSettings:
    """Return settings without any limit."""
    return dataclasses.replace(
        settings,
        header_timeout_s=0,
        body_timeout_s=0,
        max_connections=0,
        max_connections_per_client=0,
    )


def take_off(engine: EngineClient) -> None:
    """Have an engine bound no queue and count nobody's share."""
    assert isinstance(engine, Engine)
    engine._admission = Admission(NO_BOUND, NO_BOUND)
    FairShares.serve = _serve_uncounted  # type: ignore[method-assign]


def _serve_uncounted(self: FairShares, tenant: str, num_tokens: int) -> None:
    del self, tenant, num_tokens


class UnwatchedServer(DrainingServer):
    """A server that does not look after its engine."""

    async def on_tick(self, counter: int) -> bool:
        return await super(DrainingServer, self).on_tick(counter)


def serve(args: argparse.Namespace) -> None:
    """Run one side."""
    command, loaded = load(args)
    change = unprotected(command.server)
    if args.side != "off":
        change = dataclasses.replace(command.server, named_keys=KEYS)
    command = dataclasses.replace(command, server=change)
    set_up_logging("warning")
    context = make_context(command, loaded)
    if args.side == "off":
        take_off(context.engine)
    settle_collector()
    listener = bind(command.server)
    config = EdgeConfig(create_app(context, command.server), command.server)
    kind = UnwatchedServer if args.side == "off" else DrainingServer
    server = kind(config, context.engine, 1.0)
    server.run(sockets=[listener])


def headers_of(side: str, turn: int) -> Callable[[int], str]:
    """Return the headers of a stream by its number."""

    def headers(number: int) -> str:
        if side == "off":
            return ""
        lines = f"authorization: Bearer {KEYS[number % len(KEYS)].key}\r\n"
        return lines if side == "on" else f"{lines}idempotency-key: {turn}-{number}\r\n"

    return headers


async def run_rounds(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return each side's microseconds of CPU a token, a round each."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side, figures in (await run_round(args, number)).items():
            found[side].append(min(figures))  # what neighbours on the machine add is never negative
    return found


async def run_round(args: argparse.Namespace, number: int) -> dict[str, list[float]]:
    """Start a server for each side, load them in turn; return microseconds a token, a load each."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        servers = {
            side: await start_server(
                stack, "app.bench.safety", args, f"safety-{place}", "--side", side
            )
            for place, side in enumerate(ORDERS[number % len(ORDERS)])
        }
        for turn in range(NUM_LOADS):
            for side in ORDERS[(number + turn) % len(ORDERS)]:
                figures = await measure(args, *servers[side], headers_of(side, turn))
                assert figures.num_events == figures.num_expected, "tokens were lost"
                if turn:
                    found[side].append(figures.server_us_per_token)
    return found


def table(args: argparse.Namespace, found: dict[str, list[float]]) -> str:
    """Return medians and ranges, and the ratios to the side before, pair by pair, as Markdown."""
    rows = [
        f"{args.streams} chat streams of {args.tokens} tokens, steps of {args.step_ms:g} ms, "
        f"{args.rounds} rounds with new servers, the best of {NUM_LOADS - 1} loads in turn",
        "",
        "| | µs of CPU a token: median | range | over the line above, pair by pair | range |",
        "|---|---|---|---|---|",
    ]
    before: list[float] | None = None
    for side, figures in found.items():
        cells = [side, f"{statistics.median(figures):.1f}", _range(figures, "{:.1f}"), "", ""]
        if before is not None:
            ratios = [100 * (new / old - 1) for new, old in zip(figures, before, strict=True)]
            cells[3:] = [f"{statistics.median(ratios):+.1f} %", _range(ratios, "{:+.1f} %")]
        rows.append(f"| {' | '.join(cells)} |")
        before = figures
    return "\n".join(rows) + "\n"


def _range(figures: list[float], form: str) -> str:
    return f"{form.format(min(figures))} to {form.format(max(figures))}"


def main() -> None:
    """Parse the command line, run, print."""
    description = __doc__.split("\n\n")[0]
    parser = flags(description, streams=16, tokens=1000, step_ms=1.0, rounds=9)
    parser.add_argument("--side", choices=SIDES, default="on", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.endpoint = "chat"
    if args.serve:
        serve(args)
        return
    sys.stdout.write(table(args, asyncio.run(run_rounds(args))))


if __name__ == "__main__":
    main()
