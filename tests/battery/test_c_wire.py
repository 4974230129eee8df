"""Group C: bytes, connections, paths and keys, against the server's own socket."""

import contextlib
import re
import selectors
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count, cycle
from pathlib import Path

import pytest

from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import routes_of
from tests.api.test_wire_attacks import BYPASSES, LARGE, MALFORMED
from tests.battery.client import (
    CHAT,
    COMPLETIONS,
    HEALTH_BYTES,
    KEY,
    MODEL,
    OTHER_KEY,
    ROOT,
    Server,
    get_bytes,
    post_bytes,
)
from tests.fake_engine import FakeEngine, make_context, says

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
BODY = {"prompt": "a", "max_tokens": 1}
BEARER = f"Bearer {KEY}".encode()


def without_key(request: bytes) -> bytes:
    return re.sub(rb"authorization: [^\r]*\r\n", b"", request)


def without_length(request: bytes) -> bytes:
    return request.replace(b"content-length: 0\r\n", b"")


@pytest.mark.parametrize("name", LARGE)
def test_c01_headers_over_the_limit_are_refused(live, name):
    answer = live.exchange(*[part.replace(b"Bearer secret", BEARER) for part in LARGE[name]])
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_c01_twenty_megabytes_of_headers_are_not_kept(live):
    before = live.vitals().resident
    start = b"GET / HTTP/1.1\r\nhost: a\r\n"
    part = b"x" * (1 << 20)
    assert live.exchange(start, b"x: ", *[part] * 20).startswith(b"HTTP/1.1 431 ")
    assert live.exchange(start, b"a: b\r\n" * 100_000, b"\r\n").startswith(b"HTTP/1.1 431 ")
    line = b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n"
    assert live.exchange(line)[9:12] in (b"414", b"431")
    assert live.vitals().resident < before + (8 << 20)


@pytest.mark.parametrize("name", MALFORMED)
def test_c02_malformed_request_is_refused_once_and_the_connection_closed(live, name):
    answer = live.exchange(MALFORMED[name].replace(b"Bearer secret", BEARER))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


PADDED = b'{"prompt": "a", "max_tokens": 1' + b" " * 9000 + b"}"
SLOW = {  # what is sent at once, what drips, what the refusal speaks of
    "nothing at all": (b"", b"", None),
    "a method": (b"G", b"E", b"The headers"),
    "a header": (b"GET /health HTTP/1.1\r\nhost: a\r\nx: ", b"a", b"The headers"),
    "headers": (b"GET /health HTTP/1.1\r\nhost: a\r\n", b"a: b\r\n", b"The headers"),
    "a body": (post_bytes(PADDED, COMPLETIONS)[:-9000], b" ", b"The body"),
    "a body in chunks": (
        without_length(post_bytes(b"", COMPLETIONS, "transfer-encoding: chunked")),
        b"1\r\n \r\n",
        b"The body",
    ),
}
DRIP_S = 0.2  # far less than the deadlines: no connection is ever silent for as long as they are


def drip(live: Server, clients: dict[socket.socket, str]) -> dict[str, set[bytes]]:
    """Send a little on every connection, again and again; return what each kind is told."""
    told: dict[str, set[bytes]] = {}
    with selectors.DefaultSelector() as selector:
        for client, kind in clients.items():
            selector.register(client, selectors.EVENT_READ, kind)

        def are_closed() -> bool:
            for key, _ in selector.select(DRIP_S):
                selector.unregister(key.fileobj)
                told.setdefault(key.data, set()).add(live.read_all(key.fileobj))
            for key in selector.get_map().values():
                with contextlib.suppress(ConnectionError):
                    key.fileobj.send(SLOW[key.data][1])
            return not selector.get_map()

        live.wait(are_closed)
    return told


def test_c03_body_that_is_slow_is_a_good_one_when_it_is_fast(live):
    assert live.exchange(post_bytes(PADDED, COMPLETIONS)).startswith(b"HTTP/1.1 200 ")


def test_c03_slow_connections_are_ended_by_deadline_and_hold_up_nobody(live, full):
    reference, is_over = live.canary(), threading.Event()

    def be_healthy() -> int:
        for number in count():
            if is_over.is_set():
                return number
            assert live.canary() == reference
            assert live.get("/health", key=None).status == 200

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        clients = {}
        for _, kind in zip(range(2000 if full else 200), cycle(SLOW), strict=False):
            client = stack.enter_context(live.connect())
            client.sendall(SLOW[kind][0])
            clients[client] = kind
        healthy = pool.submit(be_healthy)
        try:
            told = drip(live, clients)
        finally:
            is_over.set()
        assert healthy.result() > 0
    for kind, (_, _, subject) in SLOW.items():
        if subject is None:
            assert told[kind] == {b""}  # to who has said nothing, nothing is said
            continue
        for answer in told[kind]:
            assert answer.startswith(b"HTTP/1.1 408 "), (kind, answer)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert b'"code":"request_timeout"' in answer
            assert subject + b" did not arrive" in answer


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_c04_reset_connections_free_what_they_held(live):
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
    requests = [b"", b"GET ", post_bytes(BODY, COMPLETIONS)[:-3]]
    requests += [post_bytes({**body, "stream": stream}, COMPLETIONS) for stream in (True, False)]
    for request in requests * 8:
        client = live.connect()
        client.sendall(request)
        reset(client)
    live.wait(live.is_idle)


def timers_of(port: int) -> list[int]:
    """The timers of the connections that a port has accepted: 2 is that of keep-alive probes."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[5][:2]) for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]


def test_c04_kernel_asks_after_peers_that_say_nothing(live):
    """One that vanishes without a word is found by these probes, and its request aborted."""
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
    with live.connect() as client:
        client.sendall(post_bytes({**body, "n": 8}, COMPLETIONS))
        live.wait(lambda: 2 in timers_of(live.port))
        reset(client)
    live.wait(live.is_idle)


def test_c05_body_in_chunks_of_a_byte_is_refused_before_it_costs(live):
    start = without_length(post_bytes(b"", COMPLETIONS, "transfer-encoding: chunked"))
    answer = live.exchange(start, *[b"1\r\n \r\n" * 100_000] * 30)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"too many small pieces" in answer


def test_c06_line_breaks_of_a_client_make_no_line_and_no_header(live):
    forged = "x\r\nset-cookie: a=b\r\n2026-01-01 ERROR forged-line"
    num_lines = len(live.log_text().splitlines())
    for name in ("x-request-id", "user-agent", "referer", "x-forwarded-for"):
        for value in ("a\tb", "a%0d%0aset-cookie: x", "é", "x" * 5000, "\x7f"):
            answer = live.exchange(get_bytes("/v1/models", f"{name}: {value}"))
            assert b"set-cookie" not in answer.lower()
            assert answer.count(b"x-request-id: ") == 1
    raw = get_bytes("/v1/models", "x-request-id: a\r\nset-cookie: x")
    assert b"set-cookie" not in live.exchange(raw).lower()
    live.complete("a", model=forged).check_refusal(404)
    live.complete("a", user=forged, temperature=1)
    live.get("/%0d%0a2026-01-01%20ERROR%20forged-line")
    lines = live.log_text().splitlines()[num_lines:]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines)
    assert not [line for line in lines if line.startswith("2026-01-01 ERROR")]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1", "*", "x\t"])
def test_c07_pages_of_other_origins_are_told_nothing(live, origin):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    asked = live.request("OPTIONS", COMPLETIONS, key=None, headers=headers)
    assert asked.status >= 400
    for key in (KEY, None):
        sent = live.post(COMPLETIONS, BODY, key=key, headers={"origin": origin})
        assert not [name for name in {*asked.headers, *sent.headers} if "access-control" in name]


@pytest.mark.parametrize("target", [*BYPASSES, b"/v1/../metrics", b"/health/..;/metrics"])
def test_c08_no_way_of_writing_a_path_opens_it_without_a_key(live, target):
    request = without_key(get_bytes("/x")).replace(b"/x", target, 1)
    for each in (
        request,
        request.replace(b"host: a", b"host: a/health?x="),
        request.replace(b"host: a", b"host: a\r\nx-original-url: /health"),
        request.replace(b"host: a", b"host: a\r\nx-forwarded-prefix: /health\r\nauthorization: x"),
    ):
        assert live.exchange(each).startswith(b"HTTP/1.1 401 "), each


@pytest.mark.parametrize("target", BYPASSES)
def test_c08_odd_paths_with_the_key_are_what_they_say_or_nothing(live, target):
    answer = live.exchange(get_bytes("/x").replace(b"/x", target, 1))
    assert answer[9:12] in (b"200", b"400", b"404", b"405"), answer


def test_c09_every_route_and_method_needs_the_key_but_the_open_ones(live):
    app = create_app(make_context(FakeEngine(says("x"))), ServerSettings(api_keys=("k",)))
    paths = {route.path for route in routes_of(app)}
    assert {COMPLETIONS, CHAT, "/metrics", "/docs", "/openapi.json", "/tokenize"} <= paths
    allowed = {"/", "/health", "/health/live", "/health/ready"}
    allowed |= {path for path in paths if path.startswith("/static/")}
    documented = set(live.get("/openapi.json").json["paths"])
    for path in (paths | documented | {"/x", "/static/x"}) - allowed:
        for method in METHODS:
            answer = live.request(method, path, key=None)
            assert answer.status == 401, (method, path)
    for path in allowed:
        assert live.get(path, key=None).status == 200
        for method in ("POST", "PUT", "DELETE", "TRACE"):
            assert live.request(method, path, key=None).status in (401, 405), (method, path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer  ",
        b"bearer",
        b"Bearer wrong",
        b"Bearer " + KEY[:-1].encode(),
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer " + KEY.upper().encode(),
        b"Basic " + KEY.encode(),
        KEY.encode(),
        "Bearer clé".encode(),
        b"Bearer \xff\xfe",
        b"Bearer " + KEY.encode() + b", Bearer x",
        b"Bearer x\r\nauthorization: Bearer " + KEY.encode(),
        b"Bearer " + KEY.encode() + b"\r\nauthorization: Bearer x",
        b"Bearer " + KEY.encode() + b"\r\nauthorization: Bearer " + KEY.encode(),
        b"Bearer " + b"x" * 15_000,
        b"Bearer null",
        b"Bearer *",
    ],
)
def test_c10_anything_but_one_right_key_is_a_401(live, value):
    header = b"" if value is None else b"authorization: " + value + b"\r\n"
    request = without_key(post_bytes(BODY, COMPLETIONS)).replace(
        b"host: a\r\n", b"host: a\r\n" + header
    )
    answer = live.exchange(request)
    assert answer.startswith(b"HTTP/1.1 401 "), answer
    assert b'"code":"invalid_api_key"' in answer
    assert b"www-authenticate: Bearer" in answer


def test_c10_key_of_a_megabyte_is_refused_with_the_headers(live):
    request = get_bytes("/v1/models").replace(KEY.encode(), b"x" * (1 << 20))
    assert live.exchange(request).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer  {KEY}", f"BEARER {OTHER_KEY}"])
def test_c10_right_key_is_taken(live, value):
    assert live.get("/v1/models", key=None, headers={"authorization": value}).status == 200


def test_c10_keys_are_compared_in_constant_time():
    """Digests of equal length, each compared in full: no number of samples tells one apart."""
    source = (ROOT / "app/api/middleware.py").read_text()
    assert "hmac.compare_digest(digest, known)" in source
    assert not re.search(r"(digest|known|key) (==|!=) |(==|!=) (digest|known|key)", source)


def test_c11_metrics_hold_no_text_of_a_request_and_no_more_lines_for_more_clients(live):
    def names() -> set[str]:
        lines = live.get("/metrics").body.decode().splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def use(number: int) -> None:
        secret = f"secret-{number}-text"
        headers = {"x-request-id": secret, "user-agent": secret}
        live.post(COMPLETIONS, {**BODY, "prompt": secret, "user": secret}, headers=headers)
        live.complete(secret, model=secret, cache_salt=secret)
        live.get(f"/{secret}")

    use(0)
    live.complete("a", temperature=9)
    live.exchange(b"nonsense\r\n\r\n")
    before = names()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(1, 30)))
    assert names() == before
    assert "secret-" not in live.get("/metrics").body.decode()
    assert "alice" not in live.get("/metrics").body.decode()


def test_c11_documents_and_metrics_need_the_key(live):
    for path in ("/metrics", "/docs", "/openapi.json", "/version", "/v1/engine", "/v1/models"):
        live.get(path, key=None).check_refusal(401)
        assert live.get(path).status == 200


def test_c12_upgrades_are_not_taken_up(live):
    key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    for protocol in ("websocket", "h2c", "TLS/1.0"):
        headers = ("connection: upgrade", f"upgrade: {protocol}", key, "sec-websocket-version: 13")
        for path in ("/v1/models", "/ws", "/v1/realtime"):
            request = get_bytes(path, *headers).replace(b"connection: close\r\n", b"")
            request = request.replace(b"connection: upgrade", b"connection: upgrade, close")
            assert live.exchange(request)[9:12] in (b"200", b"404")


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW", "PRI", "get"])
def test_c12_other_methods_are_refused(live, method):
    request = get_bytes(COMPLETIONS).replace(b"GET", method.encode(), 1)
    answer = live.exchange(request)
    assert answer[9:12] in (b"400", b"404", b"405")
    assert KEY.encode() not in answer  # nothing is echoed


def test_c12_head_has_no_body(live):
    for path in ("/health", "/"):
        answer = live.exchange(HEALTH_BYTES.replace(b"GET /health", f"HEAD {path}".encode()))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.partition(b"\r\n\r\n")[2] == b""
    assert live.request("HEAD", f"/v1/models/{MODEL}").status == 405
