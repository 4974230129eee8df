"""A flood of real requests at once on a scripted server: how fast each is refused or served.

    python -m tests.battery.flood                   2,000 connections; reported, never asserted

The client shares the cores with the server, so its waiting for them is part of every figure.
"""

import argparse
import re
import selectors
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.battery.client import COMPLETIONS, HEALTH_BYTES, Server, Starter, post_bytes, running
from tests.battery.soak import start_arguments

BODY = {"prompt": "a", "max_tokens": 16, "ignore_eos": True}


@dataclass
class Exchange:
    """A request under way, from its last byte on."""

    is_probe: bool
    started_s: float = field(default_factory=time.monotonic)
    answer: bytes = b""


class Flood:
    """Requests that are all sent at once, and one probe after another all the while.

    Plain sockets: what a client library does for each would be a good part of what is timed.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._num_open = 0
        self.seconds: dict[str, list[float]] = {}  # by status
        self.probe_seconds: list[float] = []
        self.hints_s: list[int] = []  # the retry-after of refusals

    def run(self, num_requests: int) -> None:
        request = post_bytes(BODY, COMPLETIONS)
        clients = [self._server.connect() for _ in range(num_requests)]
        self._probe()
        for client in clients:
            self._send(client, request)
            self._read_ready(timeout_s=0)
        while self._num_open:
            self._read_ready(timeout_s=None)

    def _probe(self) -> None:
        self._send(self._server.connect(), HEALTH_BYTES)

    def _send(self, client: socket.socket, request: bytes) -> None:
        client.sendall(request)
        exchange = Exchange(is_probe=request is HEALTH_BYTES)
        self._selector.register(client, selectors.EVENT_READ, exchange)
        self._num_open += not exchange.is_probe

    def _read_ready(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            self._read(key)

    def _read(self, key: selectors.SelectorKey) -> None:
        """Take what has come; an answer ends with its connection."""
        exchange = key.data
        part = key.fileobj.recv(65536)
        if part:
            exchange.answer += part
            return
        seconds = time.monotonic() - exchange.started_s
        self._selector.unregister(key.fileobj)
        key.fileobj.close()
        if exchange.is_probe:
            self.probe_seconds.append(seconds)
            self._probe()
            return
        self._num_open -= 1
        self.seconds.setdefault(exchange.answer[9:12].decode() or "none", []).append(seconds)
        hints_s = re.findall(rb"\r\nretry-after: (\d+)\r\n", exchange.answer)
        self.hints_s += map(int, hints_s)


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
            flood.run(args.requests)
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
