"""Bytes that no client sends by accident: refused, and the next client is served as ever."""

import re
import struct
from socket import SHUT_WR, SO_LINGER, SOL_SOCKET

import pytest

from tests.api.wire import HEALTH, check_refusal, post, read_all, read_answer, wire_server

KEY = b"authorization: Bearer secret"
GET = b"GET /v1/models HTTP/1.1\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer secret\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked"


def get(target: bytes, *headers: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"GET " + target + b" " + version, b"host: a", b"connection: close", *headers]
    return b"\r\n".join([*lines, b"", b""])


def chunked(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"host: a", KEY, CHUNKED, *headers]
    return b"\r\n".join([*lines, b"", body])


@pytest.fixture(scope="module")
def server():
    with wire_server(api_keys=("secret",), header_timeout_s=2, body_timeout_s=2) as wire:
        yield wire


@pytest.fixture
def wire(server):
    """The shared server, which must be as well after a test as before."""
    server.records.clear()
    server.engine.requests.clear()
    yield server
    assert server.is_well(), [record.getMessage() for record in server.records]


MALFORMED = {
    "no http at all": b"nonsense\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/0.9": b"GET /health\r\n\r\n",
    "http/3.0 in words": b"GET /health HTTP/three\r\n\r\n",
    "no host": GET + KEY + b"\r\n\r\n",
    "two hosts": GET + b"host: a\r\nhost: b\r\n" + KEY + b"\r\n\r\n",
    "nul in the target": b"GET /v1\x00/models HTTP/1.1\r\nhost: a\r\n\r\n",
    "nul in a name": GET + b"host: a\r\nx\x00y: 1\r\n\r\n",
    "nul in a value": GET + b"host: a\r\nx: \x00\r\n\r\n",
    "carriage return in a value": GET + b"host: a\r\nx: 1\rx-request-id: 2\r\n\r\n",
    "escape in the target": b"GET /\x1b[2J HTTP/1.1\r\nhost: a\r\n\r\n",
    "bytes in the target": b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
    "space before the colon": GET + b"host : a\r\n\r\n",
    "space before the first header": GET + b" host: a\r\n\r\n",
    "name of nothing": GET + b"host: a\r\n: 1\r\n\r\n",
    "two spaces in the request line": b"GET  /health HTTP/1.1\r\nhost: a\r\n\r\n",
    "length and chunks": chunked(b"0\r\n\r\n" + HIDDEN, b"content-length: 4"),
    "chunks and length": post(b"0\r\n\r\n" + HIDDEN, KEY, CHUNKED),
    "two lengths": post(HIDDEN, KEY, b"content-length: 0"),
    "a length that is a list of two": post(b"", KEY).replace(b"length: 0", b"length: 0, 9"),
    "negative length": post(b"", KEY).replace(b"length: 0", b"length: -1"),
    "length with a plus": post(b"", KEY).replace(b"length: 0", b"length: +3"),
    "hexadecimal length": post(b"", KEY).replace(b"length: 0", b"length: 0x9"),
    "chunks in http/1.0": chunked(b'f\r\n{"prompt": "a"}\r\n0\r\n\r\n').replace(b"/1.1", b"/1.0"),
    "identity and chunks": chunked(b"0\r\n\r\n").replace(b": chunked", b": identity, chunked"),
    "chunks twice": chunked(b"0\r\n\r\n", CHUNKED),
    "a coding of two cases and a tab": chunked(b"0\r\n\r\n").replace(
        b": chunked", b": \x0bchunked"
    ),
    "compressed": chunked(b"0\r\n\r\n").replace(b": chunked", b": gzip"),
    "no size": chunked(b"\r\n{}\r\n0\r\n\r\n"),
    "size that is no number": chunked(b"g\r\n{}\r\n0\r\n\r\n"),
    "negative size": chunked(b"-2\r\n{}\r\n0\r\n\r\n"),
    "size of 21 digits": chunked(b"f" * 21 + b"\r\n{}\r\n0\r\n\r\n"),
    "size too small": chunked(b"1\r\n{}\r\n0\r\n\r\n"),
    "two bytes that end no chunk": chunked(b"2\r\n{}XX0\r\n\r\n" + HIDDEN),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused_and_hides_no_other(wire, name):
    answer = wire.exchange(MALFORMED[name])
    check_refusal(answer, 400, None)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert wire.engine.requests == []


LARGE = {
    "10,000 headers": [GET, b"host: a\r\n", b"a: b\r\n" * 10_000, b"\r\n"],
    "129 headers": [GET, b"host: a\r\n", b"a: b\r\n" * 128, b"\r\n"],
    "header of 1 MB": [GET, b"host: a\r\nx: ", b"x" * 2**20, b"\r\n\r\n"],
    "header of 20 kB": [GET, b"host: a\r\nx: ", b"x" * 20_000, b"\r\n\r\n"],
    "header without an end": [GET, b"host: a\r\nx: ", b"x" * 2**20],
    "target of 200 kB": [b"GET /", b"x" * 200_000, b" HTTP/1.1\r\nhost: a\r\n\r\n"],
    "method of 1 MB": [b"G" * 2**20],
    "trailers of 1 MB": [chunked(b"0\r\n"), b"x: y\r\n" * 170_000],
    "chunk extension of 1 MB": [chunked(b"1;"), b"x" * 2**20],
}


@pytest.mark.parametrize("name", LARGE)
def test_headers_over_the_limit_are_refused_before_they_are_kept(wire, name):
    check_refusal(wire.exchange(*LARGE[name]), 431, "headers_too_large")


def test_as_many_headers_as_allowed_are_served(wire):
    headers = [KEY, *[b"a: b"] * 125]
    assert wire.exchange(get(b"/v1/models", *headers)).startswith(b"HTTP/1.1 200 OK\r\n")


def test_endless_chunked_body_ends_at_the_cap(wire):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = wire.exchange(chunked(b""), *[chunk] * 64)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer


def test_body_in_single_bytes_is_refused(wire):
    answer = wire.exchange(chunked(b""), b"1\r\n \r\n" * 100_000)
    check_refusal(answer, 400, None)
    assert b"too many small pieces" in answer


def test_body_shorter_than_its_length_ends_by_deadline(wire):
    check_refusal(wire.exchange(post(b"{}", KEY).replace(b": 2", b": 9")), 408, "request_timeout")


def test_what_follows_a_body_is_another_request(wire):
    answer = wire.exchange(post(b'{"prompt": "a"}', KEY) + get(b"/v1/models"))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"401"]
    assert len(wire.engine.requests) == 1


def test_pipelined_requests_are_answered_in_their_order(wire):
    requests = [get(b"/nowhere-%d" % number, KEY) for number in range(50)]
    requests = [request.replace(b"connection: close\r\n", b"") for request in requests[:-1]]
    answer = wire.exchange(b"".join([*requests, get(b"/nowhere-49", KEY)]))
    assert re.findall(rb"/nowhere-(\d+)", answer) == [b"%d" % number for number in range(50)]


def test_garbage_behind_a_request_is_refused_after_its_answer(wire):
    answer = wire.exchange(HEALTH + b"\x00\x01garbage\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"400"]


def test_garbage_in_a_body_after_the_answer_hangs_up(wire):
    start = chunked(b"").replace(KEY + b"\r\n", b"")  # 401 at once
    with wire.connect() as client:
        client.sendall(start)
        assert read_answer(client)[0] == 401
        client.sendall(b"xyz\r\n")
        assert read_all(client) == b""


def test_client_that_closes_its_half_is_gone(wire):
    wire.engine.gate.clear()
    with wire.connect() as client:
        client.sendall(post(b'{"prompt": "a"}', KEY))
        client.shutdown(SHUT_WR)
        assert read_all(client) == b""
    wire.engine.release()


@pytest.mark.parametrize("start", [b"", b"GET ", post(b"{}", KEY)[:-1], post(b"{}", KEY)])
def test_client_that_resets_its_connection_leaves_no_trace(wire, start):
    with wire.connect() as client:
        client.sendall(start)
        client.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


BYPASSES = [
    b"/v1/models",
    b"//v1/models",
    b"/v1/models/",
    b"/./v1/models",
    b"/%76%31/models",
    b"/health/../v1/models",
    b"/%68ealth/../v1/models",
    b"/health%2f..%2fv1%2fmodels",
    b"/health/%2e%2e/v1/models",
    b"/static/../v1/models",
    b"/static/..%2fv1/models",
    b"/static/%2e%2e/%2e%2e/app/cli.py",
    b"/v1/models;/health",
    b"/v1/models?/health",
    b"/v1/models%00/health",
    b"/v1/models%3f/health",
    b"/v1/models#/health",
    b"/V1/models",
    b"//health",
    b"/health/",
    b"/health//live",
    b"/health%00",
    b"/health;x",
    b"\\health",
    b"http://a/v1/models",
    b"http://a/health",
    b"http://health",
    b"*",
    b"a:80",
    b"/metrics",
    b"/docs",
    b"/docs/oauth2-redirect",
    b"/openapi.json",
    b"/static",
    b"/static/",
]


@pytest.mark.parametrize("target", BYPASSES)
def test_no_way_of_writing_a_path_opens_it_without_the_key(wire, target):
    answers = [
        wire.exchange(get(target)),
        wire.exchange(get(target).replace(b"host: a", b"host: a/health?x=")),
        wire.exchange(get(target, b"x-forwarded-prefix: /health", b"x-original-url: /health")),
        wire.exchange(get(target, b"authorization: Bearer wrong", KEY)),
    ]
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 401 "), answer
        assert b'"code":"invalid_api_key"' in answer


@pytest.mark.parametrize("target", [b"/health", b"/%68ealth", b"/health?x=/../v1/models"])
def test_probe_is_open_however_its_path_is_written(wire, target):
    assert wire.exchange(get(target)).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("method", [b"CONNECT a:80", b"OPTIONS *", b"TRACE /v1/models", b"X /v1"])
def test_odd_methods_need_the_key_too(wire, method):
    request = get(b"").replace(b"GET ", method)
    assert wire.exchange(request).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_upgrade_is_not_taken_up_and_not_logged(wire, protocol):
    upgrade = b"upgrade: " + protocol, b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    request = get(b"/v1/models", KEY, *upgrade)
    answer = wire.exchange(request.replace(b"connection: close", b"connection: upgrade, close"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert wire.records == []


def test_request_id_cannot_split_an_answer(wire):
    answer = wire.exchange(get(b"/health", b"x-request-id: a\tb%0d%0aset-cookie: x=y"))
    assert b"set-cookie" not in answer
    assert re.search(rb"x-request-id: [0-9a-f]{32}\r\n", answer)
