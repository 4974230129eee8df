"""A real server on a socket with its production edges, and clients that speak bytes to it."""

import asyncio
import contextlib
import json
import logging
import select
import socket
import threading
from collections.abc import Iterator

import uvicorn

from app.api.connections import EdgeConfig
from app.factory import create_app
from app.settings import ServerSettings
from tests.fake_engine import FakeEngine, make_context, says

PATIENCE_S = 20.0
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    """A POST of JSON as it stands on the wire."""
    lines = [b"POST /v1/completions HTTP/1.1", b"host: a", b"content-type: application/json"]
    lines += [b"content-length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


class WireEngine(FakeEngine):
    """A fake engine that may be let go on from another thread."""

    def start(self) -> None:
        super().start()
        self.loop = asyncio.get_running_loop()

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.gate.set)


class Wire:
    """A running server: where it listens and what it has logged."""

    def __init__(self, address: tuple[str, int], engine: WireEngine, config: EdgeConfig) -> None:
        self.address = address
        self.engine = engine
        self.config = config
        self.records: list[logging.LogRecord] = []

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def exchange(self, *parts: bytes) -> bytes:
        """Send bytes, however long the server takes them; return all that it answers."""
        with self.connect() as client:
            for part in parts:
                with contextlib.suppress(ConnectionError):
                    client.sendall(part)
            return read_all(client)

    def is_well(self) -> bool:
        """Whether an ordinary client is served and nothing was logged as a failure."""
        headers = b"authorization: Bearer secret", b"connection: close"
        answer = self.exchange(post(b'{"prompt": "a"}', *headers))
        faults = [record for record in self.records if record.levelno >= logging.ERROR]
        return answer.startswith(b"HTTP/1.1 200 OK\r\n") and not faults


@contextlib.contextmanager
def wire_server(
    engine: WireEngine | None = None, *, send_buffer: int | None = None, **options
) -> Iterator[Wire]:
    """Serve the application on a free port of the loopback; the kernel may buffer but so much."""
    engine = engine or WireEngine(says("x"))
    settings = ServerSettings(**options)
    context = make_context(engine)
    config = EdgeConfig(create_app(context, settings), settings)
    listener = socket.socket()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    wire = Wire(listener.getsockname(), engine, config)
    handler = logging.Handler(logging.WARNING)
    handler.emit = wire.records.append
    logging.getLogger().addHandler(handler)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield wire
    finally:
        server.should_exit = True
        thread.join()
        logging.getLogger().removeHandler(handler)


def read_all(client: socket.socket) -> bytes:
    """All bytes until the server hangs up."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            answer += part
    return answer


def read_answer(client: socket.socket) -> tuple[int, dict]:
    """One answer with a JSON body of a connection that stays open: its status and body."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = client.recv(65536)
        assert part, answer
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += client.recv(65536)
    return int(head.split()[1]), json.loads(body)


def drip(client: socket.socket, part: bytes, every_s: float = 0.02) -> bytes:
    """Send bytes now and then until the server answers or hangs up; return what it says."""
    while not select.select([client], [], [], every_s)[0]:
        client.sendall(part)
    return read_all(client)


def check_refusal(answer: bytes, status: int, code: str | None) -> None:
    """An answer is one refusal in OpenAI's shape, after which the connection closes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    assert lines[0].startswith(b"http/1.1 %d " % status), answer
    assert b"connection: close" in lines
    assert b"content-type: application/json" in lines
    assert any(line.startswith(b"x-request-id: ") for line in lines)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
