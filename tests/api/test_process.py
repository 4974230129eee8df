"""What holds of the server as a process: its signals, its socket, its log."""

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.api.connections import EdgeConfig
from app.main import DrainingServer, bind
from app.settings import ServerSettings
from tests.api.wire import PATIENCE_S, Wire, post, read_all
from tests.fake_engine import FakeEngine, says

ROOT = Path(__file__).resolve().parents[2]
KEY = b"authorization: Bearer secret"
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@contextlib.contextmanager
def running(log_level: str = "info", drain_s: float = 30, log_format: str = "text"):
    """A server process and a client of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.api.serve_process", log_level, str(drain_s), log_format],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wire = Wire(("127.0.0.1", int(process.stdout.readline())), None, None)
        assert wire.exchange(HEALTH).startswith(b"HTTP/1.1 200 OK")
        yield process, wire
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process_at_once_and_without_a_traceback(number):
    with running() as (process, wire), wire.connect() as client, wire.connect() as stream:
        client.sendall(post(b'{"prompt": "a"}', KEY))
        stream.sendall(post(b'{"prompt": "a", "stream": true}', KEY))
        assert stream.recv(65536).startswith(b"HTTP/1.1 200 OK")
        process.send_signal(number)
        while b"503" not in wire.exchange(HEALTH.replace(b"/health", b"/health/ready"))[:20]:
            assert process.poll() is None
        started_s = time.monotonic()
        process.send_signal(number)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - started_s < 4  # of 30 that requests in work would have had
        assert "Traceback" not in log
        assert "ERROR" not in log
        assert process.returncode == 0


def test_signal_that_comes_as_the_process_ends_changes_nothing():
    with running() as (process, _):
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in log
        assert process.returncode == 0


def test_request_that_outlasts_the_drain_is_hung_up_on_without_a_traceback():
    with running(drain_s=0.5) as (process, wire), wire.connect() as client:
        client.sendall(post(b'{"prompt": "a"}', KEY))
        process.send_signal(signal.SIGTERM)
        while b"503" not in wire.exchange(HEALTH.replace(b"/health", b"/health/ready"))[:20]:
            assert process.poll() is None
        _, log = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in log
        assert process.returncode == 0


def test_one_socket_listens_and_only_on_the_loopback():
    with running() as (process, _):
        found = [
            connection.laddr.ip
            for connection in psutil.Process(process.pid).net_connections(kind="all")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert found == ["127.0.0.1"]


def test_nothing_that_a_client_sends_makes_a_line_of_its_own_in_the_log():
    forged = b"%0d%0a2026-01-01%2000:00:00,000%20ERROR%20forged%1b[2J%C2%85%E2%80%A8"
    target = b"/" + forged
    headers = [
        b"x-request-id: a\x1b[31m",
        b"x-forwarded-for: forged\x1b[2J",
        b"user-agent: forged",
        b"referer: forged",
    ]
    body = b'{"prompt": "a", "model": "x\\n2026-01-01 ERROR forged\\u001b[2J"}'
    with running("debug") as (process, wire):
        for key in (b"authorization: Bearer forged\x1b[2J", KEY):
            head = [b"GET " + target + b"?" + forged + b" HTTP/1.1", b"host: a"]
            wire.exchange(b"\r\n".join([*head, b"connection: close", key, *headers, b"", b""]))
            wire.exchange(post(body, b"connection: close", key, *headers))
        with wire.connect() as client:
            client.sendall(post(body.replace(b'"model"', b'"user"'), KEY))
            client.shutdown(1)
            read_all(client)
        process.kill()
        _, log = process.communicate(timeout=PATIENCE_S)
    lines = log.rstrip("\n").split("\n")
    assert len([line for line in lines if "forged" in line]) == 2  # two GETs, a line each
    assert all(line.isprintable() for line in lines)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines)
    assert "secret" not in log
    assert not [line for line in lines if re.match(r"\S+ \S+ ERROR ", line)]


def test_flood_is_answered_from_its_beginning_on_not_once_all_of_it_is_accepted():
    async def scenario():
        num_accepted: list[int] = []
        is_served = asyncio.Event()

        async def app(scope, receive, send):
            assert scope["type"] == "http"
            num_accepted.append(len(server.server_state.connections))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if len(num_accepted) == len(clients):
                is_served.set()

        settings = ServerSettings(port=0)
        server = DrainingServer(EdgeConfig(app, settings), FakeEngine(says("x")), 1.0)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        listener = bind(settings)
        await server.startup([listener])
        with contextlib.ExitStack() as stack:
            # The loop stands still meanwhile, so all of them wait to be accepted.
            address = listener.getsockname()
            clients = [
                stack.enter_context(socket.create_connection(address, PATIENCE_S))
                for _ in range(300)
            ]
            for client in clients:
                client.sendall(HEALTH)
            await asyncio.wait_for(is_served.wait(), PATIENCE_S)
            await server.shutdown([listener])
        assert num_accepted[0] < 150

    asyncio.run(scenario())
