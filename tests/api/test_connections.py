"""Deadlines and caps of open connections, on a real socket."""

import contextlib

import pytest

from app.api import connections
from app.api.connections import OpenConnections, client_of
from tests.api.wire import (
    HEALTH,
    WireEngine,
    check_refusal,
    drip,
    post,
    read_all,
    read_answer,
    wire_server,
)
from tests.fake_engine import says

BODY = b'{"prompt": "a"}'
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"


def test_headers_that_drip_are_given_up_after_their_deadline():
    with wire_server(header_timeout_s=0.3) as wire, wire.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: ")
        check_refusal(drip(client, b"a"), 408, "request_timeout")
        assert wire.is_well()


def test_connection_that_says_nothing_is_closed_without_a_word():
    with wire_server(header_timeout_s=0.3) as wire, wire.connect() as client:
        assert read_all(client) == b""
        assert wire.is_well()


@pytest.mark.parametrize(
    "headers", [b"content-length: 1000", b"transfer-encoding: chunked"], ids=["length", "chunked"]
)
def test_body_that_drips_is_given_up_after_its_deadline(headers):
    with wire_server(body_timeout_s=0.3) as wire, wire.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + headers + b"\r\n\r\n")
        part = b" " if b"length" in headers else b"1\r\n \r\n"
        check_refusal(drip(client, part), 408, "request_timeout")
        assert wire.engine.requests == []
        assert wire.is_well()


def test_client_that_waits_for_continue_and_sends_nothing_is_given_up():
    with wire_server(body_timeout_s=0.3) as wire, wire.connect() as client:
        client.sendall(post(b"", b"expect: 100-continue").replace(b"length: 0", b"length: 9"))
        answer = read_all(client).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        check_refusal(answer, 408, "request_timeout")
        assert wire.is_well()


def test_second_request_of_a_connection_has_its_own_deadlines():
    with wire_server(header_timeout_s=0.3, body_timeout_s=0.3) as wire, wire.connect() as client:
        client.sendall(post(BODY))
        assert read_answer(client)[0] == 200
        client.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        check_refusal(drip(client, b"a"), 408, "request_timeout")
        with wire.connect() as other:
            other.sendall(post(BODY))
            assert read_answer(other)[0] == 200
            other.sendall(post(BODY)[:-5])
            check_refusal(drip(other, b" ", 0.1), 408, "request_timeout")
        assert wire.is_well()


def test_deadlines_do_not_touch_an_answer_that_takes_longer():
    with wire_server(header_timeout_s=0.1, body_timeout_s=0.1) as wire:
        wire.engine.gate.clear()
        with wire.connect() as client, wire.connect() as witness:
            client.sendall(post(b'{"prompt": "a", "stream": true}', b"connection: close"))
            assert read_all(witness) == b""  # opened later, its deadline has passed
            wire.engine.release()
            assert b"data: [DONE]" in read_all(client)
        assert wire.is_well()


def test_idle_connection_outlives_the_header_deadline():
    with wire_server(header_timeout_s=0.1) as wire, wire.connect() as client:
        client.sendall(MODELS)
        assert read_answer(client)[0] == 200
        with wire.connect() as witness:
            assert read_all(witness) == b""
        client.sendall(MODELS)
        assert read_answer(client)[0] == 200


def test_body_that_goes_on_after_the_answer_ends_with_the_connection(monkeypatch):
    monkeypatch.setattr(connections, "LINGER_S", 0.3)
    with wire_server(api_keys=("secret",)) as wire, wire.connect() as client:
        client.sendall(post(b"")[:-4].replace(b"length: 0", b"length: 999999") + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            drip_until_closed = b""
            status, _ = read_answer(client)
            assert status == 401
            drip_until_closed = drip(client, b" ")
        assert drip_until_closed == b""
        assert wire.is_well()


def test_connection_goes_on_behind_a_body_that_was_refused_unread():
    with wire_server() as wire, wire.connect() as client:
        wire.engine.is_full = True
        for _ in range(3):
            request = post(BODY)
            client.sendall(request[: -len(BODY)])
            assert read_answer(client)[0] == 503
            client.sendall(request[-len(BODY) :])
        wire.engine.is_full = False
        client.sendall(post(BODY))
        assert read_answer(client)[0] == 200
        assert wire.is_well()


@contextlib.contextmanager
def held(wire, number):
    """Connections whose requests are in work until this ends."""
    wire.engine.gate.clear()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(wire.connect()) for _ in range(number)]
        for client in clients:
            client.sendall(post(BODY))
        with wire.connect() as last:  # answered after what was sent before it has been read
            last.sendall(HEALTH)
            assert read_answer(last)[0] == 200
        yield clients
        wire.engine.release()
        assert [read_answer(client)[0] for client in clients] == [200] * number


@pytest.mark.parametrize(
    "limits",
    [{"max_connections": 3}, {"max_connections_per_client": 3}],
    ids=["in all", "per client"],
)
def test_above_the_cap_only_probes_are_answered(limits):
    with wire_server(**limits) as wire:
        with held(wire, 3):
            for path in (b"/health", b"/health/live", b"/health/ready?x=1"):
                with wire.connect() as probe:
                    probe.sendall(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n")
                    assert read_answer(probe)[0] == 200
            for request in (
                MODELS,
                post(BODY),
                b"GET /health/../v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
            ):
                answer = wire.exchange(request)
                check_refusal(answer, 503, "too_many_connections")
                assert b"\r\nretry-after: 1\r\n" in answer
        assert wire.is_well()


def test_silent_connections_above_the_cap_do_not_keep_out_a_probe(monkeypatch):
    monkeypatch.setattr(connections, "NUM_RESERVED", 3)
    monkeypatch.setattr(connections, "RESERVED_TIMEOUT_S", 100.0)
    with wire_server(max_connections=1, header_timeout_s=100) as wire:
        with held(wire, 1), contextlib.ExitStack() as stack:
            silent = [stack.enter_context(wire.connect()) for _ in range(5)]
            with wire.connect() as probe:
                probe.sendall(HEALTH)
                assert read_answer(probe)[0] == 200
            assert [read_all(client) for client in silent[:3]] == [b""] * 3
        assert wire.is_well()


def test_connection_without_a_request_makes_room_at_the_cap(monkeypatch):
    monkeypatch.setattr(connections, "IDLE_GRACE_S", 0.0)
    with wire_server(max_connections=4) as wire, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(wire.connect()) for _ in range(4)]
        for _ in range(3):
            answer = wire.exchange(post(BODY, b"connection: close"))
            assert answer.startswith(b"HTTP/1.1 200 OK")
        assert read_all(silent[0]) == b""  # the oldest went first
        silent[3].sendall(MODELS)
        assert read_answer(silent[3])[0] == 200


def test_places_are_given_back():
    with wire_server(max_connections_per_client=2) as wire:
        for _ in range(20):
            assert b"200 OK" in wire.exchange(post(BODY, b"connection: close"))
        for _ in range(20):
            assert b"HTTP/1.1 400" in wire.exchange(b"nonsense\r\n\r\n")
            # Refused connections linger until their client hangs up, which it has.
            assert b"200 OK" in wire.exchange(
                HEALTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
            )
    assert len(wire.config.open_connections) == 0


def test_limits_of_zero_are_none():
    peers = OpenConnections(0, 0)
    places = [object() for _ in range(5000)]
    for place in places:
        peers.admit(place, "a", 0.0)
    assert len(peers) == 5000
    assert not any(peers.is_reserved(place) for place in places)


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("somewhere", "somewhere"),
    ],
)
def test_client_is_an_address_or_a_network_of_ipv6(address, client):
    assert client_of((address, 1)) == client


def test_client_of_no_address_is_nobody():
    assert client_of(None) == ""


def test_shutdown_with_connections_in_every_phase_leaves_none():
    with wire_server() as wire, contextlib.ExitStack() as stack:
        starts = [b"", b"GET ", post(BODY)[:-1], HEALTH, b"nonsense\r\n\r\n"]
        clients = [stack.enter_context(wire.connect()) for _ in starts]
        for client, start in zip(clients, starts, strict=True):
            client.sendall(start)
        assert wire.is_well()
    assert len(wire.config.open_connections) == 0
    assert [record.getMessage() for record in wire.records if record.exc_info] == []


def test_streamed_token_costs_the_edges_nothing(monkeypatch):
    """Neither timers nor phases are touched while an answer is written."""
    calls = []
    enter = connections.GuardedProtocol._enter
    monkeypatch.setattr(
        connections.GuardedProtocol,
        "_enter",
        lambda self, phase: (calls.append(phase), enter(self, phase))[1],
    )
    counts = []
    with wire_server(WireEngine(says("x" * 200))) as wire:
        for num_tokens in (2, 200):
            calls.clear()
            body = b'{"prompt": "a", "stream": true, "max_tokens": %d}' % num_tokens
            assert b"[DONE]" in wire.exchange(post(body, b"connection: close"))
            counts.append(len(calls))
    assert counts[0] == counts[1] > 0
