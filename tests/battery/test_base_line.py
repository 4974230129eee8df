"""What is checked after every case can fail: each thing is taken away from a real server once."""

import json
import signal
import traceback
from dataclasses import replace

import pytest

from tests.battery.base_line import BaseLine, warm_up
from tests.battery.client import (
    COMPLETIONS,
    KEY,
    LEAKS,
    OTHER_KEY,
    ROOT,
    Server,
    post_bytes,
    running,
)
from tests.battery.load import LONG

SOON_S = 3.0  # what would come back has come back by then


def base_line_of(server: Server) -> BaseLine:
    reference, vitals = server.canary(), server.vitals_at_rest()
    base_line = BaseLine(reference, vitals, vitals.resident)
    base_line.check(server, SOON_S)
    return base_line


def check_fails(base_line: BaseLine, server: Server, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        base_line.check(server, SOON_S)


@pytest.fixture(scope="module")
def leaking(starter, arguments, tmp_path_factory):
    """A server that the tests of this file share: a base line is taken before each leak."""
    with running(starter, arguments, tmp_path_factory.mktemp("leaking") / "log") as server:
        warm_up(server)
        yield server


@pytest.mark.parametrize(
    ("leak", "fault"),
    [
        ("file", "open files"),
        ("thread", "threads"),
        ("child", "a child process is left"),
        ("memory", "memory grew by"),
    ],
)
def test_what_one_request_leaves_behind_is_noticed(leaking, leak, fault):
    base_line = base_line_of(leaking)
    assert leaking.complete(f"fault:leak={leak} x").status == 200
    check_fails(base_line, leaking, fault)
    base_line_of(leaking).check(leaking, SOON_S)  # and nothing else is


def test_memory_that_grows_little_by_little_is_noticed(leaking):
    """No case takes too much of it, all of them do."""
    base_line = base_line_of(leaking)
    earlier = replace(base_line.at_start, resident=base_line.at_start.resident - (300 << 20))
    assert leaking.complete("fault:leak=memory again").status == 200
    resident = leaking.vitals().resident
    check_fails(BaseLine(base_line.reference, earlier, resident), leaking, "MiB in all")


def test_wrong_tokens_of_a_canary_are_noticed(leaking):
    base_line = base_line_of(leaking)
    leaking.complete("fault:wrong x", max_tokens=1)
    check_fails(base_line, leaking, "another song")
    leaking.complete("fault:heal x", max_tokens=1)
    base_line.check(leaking, SOON_S)


def test_answer_that_quotes_an_exception_is_noticed(leaking):
    base_line = base_line_of(leaking)
    answer = leaking.complete("fault:told x")
    assert answer.status == 500
    check_fails(base_line, leaking, "leaked: .*Traceback")
    leaking.exchanges.clear()
    events = leaking.stream("fault:told y")
    assert "Traceback" in events[-1]["error"]["message"]
    check_fails(base_line, leaking, "leaked: .*Traceback")
    leaking.exchanges.clear()
    base_line.check(leaking, SOON_S)


def test_lost_block_is_noticed(start):
    with start() as server:
        warm_up(server)
        base_line = base_line_of(server)
        assert server.complete("fault:leak=block x").status == 200
        check_fails(base_line, server, "blocks or requests are left")


def test_server_that_takes_no_more_requests_is_noticed(start):
    with start(flags=("--shutdown-timeout", "60"), is_scripted=True, pace_s=0.05) as server:
        vitals = server.vitals_at_rest()
        base_line = BaseLine([], vitals, vitals.resident)
        with server.connect() as client:
            client.sendall(post_bytes({"prompt": "a", **LONG}, COMPLETIONS))
            server.wait(lambda: server.engine()["num_requests_running"] == 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: server.get("/health/ready", key=None).status == 503)
            check_fails(base_line, server, "is not healthy")


def test_server_that_has_ended_is_noticed(start):
    with start() as server:
        warm_up(server)
        base_line = base_line_of(server)
        server.end()
        check_fails(base_line, server, "has ended")


def caught() -> str:
    try:
        raise ValueError("x")
    except ValueError:
        return traceback.format_exc()


@pytest.mark.parametrize(
    "said",
    [
        caught(),
        f'File "{__file__}", line 1',
        json.dumps(f'File "{__file__}", line 1'),
        f"{ROOT}/app/main.py",
        pytest.__file__,
        json.__file__ if json.__file__.startswith("/usr/lib") else "/usr/lib/python3/json.py",
        repr(object()),
        repr(caught),
        hex(id(caught)),
        KEY,
        OTHER_KEY,
    ],
)
def test_traceback_path_address_and_secret_are_noticed(said):
    assert LEAKS.search(f"before {said} after".encode())


@pytest.mark.parametrize("said", ["0x", "0xff", "File a", "an object", "/v1/models", "/etc/passwd"])
def test_harmless_words_are_not(said):
    assert not LEAKS.search(said.encode())
