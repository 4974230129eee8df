"""A flood of real requests at once on a scripted server: how fast each is refused or served.

    python -m tests.battery.flood                   2,000 connections; reported, never asserted

The client shares the cores with the server, so its waiting for them is part of every figure.
"""

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.battery.client import COMPLETIONS, HEALTH_BYTES, Server, Starter, post_bytes, running
from tests.battery.soak import start_arguments

BODY = {"prompt": "a", "max_tokens": 16, "ignore_eos": True}


class Flood:
    """Requests that are all sent at once, and probes all the while."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.seconds: dict[str, list[float]] = {}  # by status
        self.probe_seconds: list[float] = []
        self.hints_s: list[int] = []  # the retry-after of refusals

    async def run(self, num_requests: int) -> None:
        request = post_bytes(BODY, COMPLETIONS)
        asked = [asyncio.ensure_future(self._ask(request)) for _ in range(num_requests)]
        while not all(each.done() for each in asked):
            _, seconds = await self._exchange(HEALTH_BYTES)
            self.probe_seconds.append(seconds)
            await asyncio.sleep(0)
        await asyncio.gather(*asked)

    async def _ask(self, request: bytes) -> None:
        answer, seconds = await self._exchange(request)
        self.seconds.setdefault(answer[9:12].decode() or "none", []).append(seconds)
        self.hints_s += map(int, re.findall(rb"\r\nretry-after: (\d+)\r\n", answer))

    async def _exchange(self, request: bytes) -> tuple[bytes, float]:
        """Return the answer and the time from the request's last byte to the answer's."""
        reader, writer = await asyncio.open_connection(*self._server.address)
        writer.write(request)
        started_s = time.monotonic()
        answer = await reader.read()
        writer.close()
        return answer, time.monotonic() - started_s


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    places = (("median", 0.5), ("99 %", 0.99), ("most", 1.0))
    picked = [
        (name, ordered[min(int(len(ordered) * part), len(ordered) - 1)]) for name, part in places
    ]
    return ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in picked)


def main() -> None:
    """Flood a server and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    starter = Starter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = {"is_scripted": True, "num_blocks": 96, "max_queued": 128}
        with running(starter, start_arguments(folder), folder / "log", **options) as server:
            starter.close()
            for _ in range(50):
                server.complete("a")
            flood = Flood(server)
            asyncio.run(flood.run(args.requests))
            health = server.get("/health").status
    counts = Counter({status: len(each) for status, each in flood.seconds.items()})
    lines = [
        f"{status}: {counts[status]}, {spread(flood.seconds[status])}" for status in sorted(counts)
    ]
    lines += [f"/health meanwhile: {len(flood.probe_seconds)}, {spread(flood.probe_seconds)}"]
    hints_s = flood.hints_s or [0]
    lines += [
        f"refusals with retry-after: {len(flood.hints_s)}, {min(hints_s)} to {max(hints_s)} s"
    ]
    lines += [f"/health afterwards: {health}"]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
