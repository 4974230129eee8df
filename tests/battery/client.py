"""A server process of the battery, its vital signs, and clients that remember all it said."""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.battery.faults import INNER

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0
TIMER_S = 3.0  # far more than any timer of the server's lasts
KEY = "battery-secret-alice"
OTHER_KEY = "battery-secret-bob"
MODEL = "toy"
CANARY = "once upon a time there was a little llama"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HEALTH_BYTES = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
LEAKS = re.compile(
    rb"Traceback|site-packages|File \\?\"|0x[0-9a-f]{6,}|battery-secret|hidden-in-the-fault|"
    rb"[a-z] object at 0|/usr/lib/|pytest-of-|"
    + b"|".join(re.escape(str(path).encode()) for path in {ROOT, sys.prefix})
)
assert LEAKS.search(INNER.encode())


@dataclass(frozen=True)
class Answer:
    """One answer of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def token_ids(self) -> list[int]:
        return self.json["choices"][0]["token_ids"]

    def check_refusal(self, status: int | tuple[int, ...] = 400, param: str | None = None) -> dict:
        """The answer is one short refusal in OpenAI's shape; return the error."""
        statuses = (status,) if isinstance(status, int) else status
        assert self.status in statuses, (self.status, self.body[:300])
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        assert len(self.body) < 4096
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if param is not None:
            assert (error["param"] or "").split(".")[0] == param, error
        return error


def answer_of(raw: bytes) -> Answer:
    """An answer with a JSON body as it stands on the wire."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(status.split()[1]), {k.lower(): v for k, v in headers.items()}, body)


@dataclass(frozen=True)
class Vitals:
    """What a process holds."""

    num_files: int
    num_threads: int
    resident: int
    num_children: int


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen
    port: int
    log: Path
    exchanges: list[bytes] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    # Clients

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = KEY,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> Answer:
        """Send a request on a connection of its own; an object is sent as JSON."""
        sent = {"connection": "close"}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        if body is not None:
            sent["content-type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(*self.address, timeout=timeout_s)
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in response.getheaders()}
        self.exchanges.append(repr(names).encode() + content)
        return Answer(response.status, names, content)

    def get(self, path: str, **options) -> Answer:
        return self.request("GET", path, **options)

    def post(self, path: str, body: object, **options) -> Answer:
        return self.request("POST", path, body, **options)

    def complete(self, prompt: object, *, key: str = KEY, **fields) -> Answer:
        """Complete a prompt greedily, with the ids of the tokens."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        return self.post(COMPLETIONS, {**body, **fields}, key=key)

    def chat(self, content: object, **fields) -> Answer:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        return self.post(CHAT, {**body, "temperature": 0, **fields})

    def stream(self, prompt: object, **fields) -> list[dict]:
        """Stream a completion to its end; [DONE] stands as {"done": True}, a cut as nothing."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        request = post_bytes({**body, "stream": True, **fields}, COMPLETIONS)
        with self.connect() as client:
            client.sendall(request)
            return events_of(self.read_all(client))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def read_all(self, client: socket.socket) -> bytes:
        """All bytes until the server hangs up."""
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                answer += part
        self.exchanges.append(answer)
        return answer

    def exchange(self, *parts: bytes) -> bytes:
        """Send bytes, as many as the server takes; return all that it answers."""
        with self.connect() as client:
            for part in parts:
                try:
                    client.sendall(part)
                except ConnectionError:
                    break
            return self.read_all(client)

    # Vital signs

    def wait(
        self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S, fault: str = "not so"
    ) -> None:
        """Wait until something is so, bounded by the suite's patience."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"{fault}: {self.log_text()[-2000:]}"
            threading.Event().wait(0.01)

    def log_text(self) -> str:
        return Path(self.log).read_text("utf-8", "replace") if Path(self.log).is_file() else ""

    def engine(self) -> dict:
        return self.get("/v1/engine").json

    def is_idle(self) -> bool:
        view = self.engine()
        num_live = view["num_requests_running"] + view["num_requests_waiting"]
        return not num_live and view["num_free_blocks"] == view["num_blocks"]

    def vitals(self) -> Vitals:
        process = psutil.Process(self.process.pid)
        return Vitals(
            num_files=process.num_fds(),
            num_threads=process.num_threads(),
            resident=process.memory_info().rss,
            num_children=len(process.children()),
        )

    def vitals_at_rest(self) -> Vitals:
        """What the process holds for longer: no connection, not even one that is just closing."""
        self.wait(lambda: not self.peers())
        return dataclasses.replace(self.vitals(), num_threads=self.num_lasting_threads())

    def num_lasting_threads(self) -> int:
        """How many threads there are but the watchdog's timer, a new one ten times a second."""
        threads, num_before = self._thread_ids(), None
        deadline_s = time.monotonic() + TIMER_S
        while num_before in (None, len(threads)) and time.monotonic() < deadline_s:
            threading.Event().wait(0.02)
            num_before = len(threads)
            threads &= self._thread_ids()
        return len(threads)

    def _thread_ids(self) -> set[int]:
        return {thread.id for thread in psutil.Process(self.process.pid).threads()}

    def peers(self) -> set[int]:
        """The ports of the clients whose connections the server has not closed."""
        connections = psutil.Process(self.process.pid).net_connections("tcp")
        return {connection.raddr.port for connection in connections if connection.raddr}

    def canary(self) -> list[int]:
        answer = self.complete(CANARY)
        assert answer.status == 200, answer.body
        return answer.token_ids

    def check_nothing_leaked(self) -> None:
        for exchange in self.exchanges:
            found = LEAKS.search(exchange)
            assert not found, f"leaked: {exchange[max(0, found.start() - 100) :][:300]!r}"

    def end(self, number: int = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def post_bytes(body: object, path: str = CHAT, *headers: str) -> bytes:
    """A POST as it stands on the wire, on a connection that ends with it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: a", f"authorization: Bearer {KEY}"]
    lines += ["content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join([*lines, "connection: close", *headers, "", ""]).encode() + content


def get_bytes(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "host: a", f"authorization: Bearer {KEY}"]
    return "\r\n".join([*lines, "connection: close", *headers, "", ""]).encode()


def events_of(answer: bytes) -> list[dict]:
    """The events of a streamed answer as it stands on the wire."""
    data = re.findall(rb"^data: (.*)$", answer.partition(b"\r\n\r\n")[2], re.MULTILINE)
    return [{"done": True} if each == b"[DONE]" else json.loads(each) for each in data]


def streamed_ids(events: Sequence[dict]) -> list[int]:
    """The token ids of a streamed completion, which must have ended well."""
    assert events, "nothing was streamed"
    assert events[-1] == {"done": True}, events[-1]
    choices = [event["choices"][0] for event in events[:-1] if event["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return [token_id for choice in choices for token_id in choice["token_ids"] or ()]


class Starter:
    """Starts server processes; one more has always done its imports and waits for its options."""

    def __init__(self) -> None:
        self._spare = self._launch()

    def take(self) -> subprocess.Popen:
        process, self._spare = self._spare, self._launch()
        return process

    def close(self) -> None:
        end(self._spare)

    def _launch(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.battery.server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Buffered, as a server is that nobody started from here.
            env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": ""},
        )


def end(process: subprocess.Popen) -> None:
    """Kill a process and close its pipes."""
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@contextlib.contextmanager
def running(
    starter: Starter, arguments: Sequence[str], log: Path, *, port: int = 0, **options: object
) -> Iterator[Server]:
    """Start a server of the battery and kill it in the end; nothing it said may leak."""
    process = starter.take()
    try:
        words = [*arguments, "--port", str(port)]
        line = json.dumps({"arguments": words, "log": str(log), **options})
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, Path(log).read_text() if Path(log).is_file() else "it has not started"
        server = Server(process, int(answer), log)
        server.wait(lambda: is_listening(server))
        yield server
        server.check_nothing_leaked()
    finally:
        end(process)


def is_listening(server: Server) -> bool:
    try:
        return server.get("/health").status == 200
    except OSError:
        assert server.process.poll() is None, server.log_text()
        return False


def has_hung_up(client: socket.socket) -> bool:
    """Whether the server has closed a connection; what it said before is dropped."""
    try:
        while True:
            if not client.recv(65536, socket.MSG_DONTWAIT):
                return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
