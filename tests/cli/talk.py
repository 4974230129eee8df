"""A connection of the command line to the application over a fake engine, in this process."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator

import httpx

from app.cli.connection import Connection
from app.cli.transport import AppTransport
from app.factory import create_app
from app.settings import ServerSettings
from tests.fake_engine import FakeEngine, make_context


@contextlib.contextmanager
def connected(engine: FakeEngine, **options) -> Iterator[Connection]:
    """A connection through the transport that the commands themselves use."""
    context = make_context(engine, **options)
    transport = AppTransport(create_app(context, ServerSettings()))
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=transport, base_url="http://arriero")
        try:
            yield Connection(runner, client)
        finally:
            runner.run(client.aclose())
            context.grammars.close()


class Typist:
    """A keyboard whose lines are known; Ctrl-C is a line. It may stop an answer at its start."""

    CTRL_C = "\x03"

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = deque(lines)
        self.stops_answers = False

    def line(self) -> str:
        if not self._lines:
            raise EOFError
        line = self._lines.popleft()
        if line == self.CTRL_C:
            raise KeyboardInterrupt
        return line

    @contextlib.contextmanager
    def watch(self, stop) -> Iterator[None]:
        if self.stops_answers:
            asyncio.get_running_loop().call_soon(stop)
        yield
