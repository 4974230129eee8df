"""Group D, retries and quotas: clients that go and come back, the same request twice, limits."""

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.battery.client import CHAT, COMPLETIONS, KEY, OTHER_KEY, Server, post_bytes

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HELLO = {"messages": [{"role": "user", "content": "once upon a time"}]}
SHAPES = {
    "completion": (COMPLETIONS, {"prompt": "once upon", "logprobs": 2}),
    "two prompts, two choices": (
        COMPLETIONS,
        {"prompt": ["once", "upon a"], "n": 2, "return_token_ids": True, "max_tokens": 60},
    ),
    "chat": (CHAT, {**HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}),
    "regex": (COMPLETIONS, {"prompt": "a", "guided_regex": "[a-z ]{80,120}", "ignore_eos": None}),
    "tool": (
        CHAT,
        {**HELLO, "tools": [TOOL], "tool_choice": "auto", "stop": ["zz"], "temperature": 1.3},
    ),
}
SAMPLING = {"stream": True, "temperature": 1.0, "seed": 11, "max_tokens": 120, "ignore_eos": True}
EVENT = re.compile(rb"(?:id: ([^\r\n]*)\n)?data: ([^\r\n]*)\n\n")


def keyed(body: dict, path: str, *headers: str) -> bytes:
    return post_bytes(body, path, "idempotency-key: k-1", *headers)


def events_in(answer: bytes) -> list[tuple[bytes, bytes]]:
    """Id and data of the events in a chunked answer, whole ones alone."""
    content = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", b"\r\n" + answer.partition(b"\r\n\r\n")[2])
    return [(match[1], match[2]) for match in EVENT.finditer(content)]


def read_some(server: Server, request: bytes, num_events: int) -> list[tuple[bytes, bytes]]:
    """Read events of a stream, then hang up in the middle."""
    with server.connect() as client:
        client.sendall(request)
        answer = b""
        while len(events_in(answer)) < num_events and (part := client.recv(4096)):
            answer += part
        client.shutdown(socket.SHUT_RDWR)
    server.exchanges.append(answer)
    return events_in(answer)


def said(events: list[tuple[bytes, bytes]]) -> dict[int, list]:
    """All that a stream says of each choice; where its text is cut depends on the clock."""
    assert events[-1] == (None, b"[DONE]"), events[-3:]
    found: dict[int, list] = {}
    for _, data in events[:-1]:
        for choice in json.loads(data)["choices"]:
            delta, parts = choice.get("delta", {}), found.setdefault(choice["index"], ["", [], []])
            parts[0] += choice.get("text") or delta.get("content") or ""
            parts[1] += choice.get("token_ids") or []
            scores = choice.get("logprobs") or {}
            parts[1] += scores.get("token_logprobs") or scores.get("content") or []
            parts[2] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return found


def check_comes_back(server: Server, path: str, body: dict) -> int:
    """Leave a stream again and again; return how many times it was under way still."""
    whole = said(events_in(server.exchange(post_bytes(body, path))))
    events = read_some(server, keyed(body, path), 2)
    num_left = 0
    while events[-1][1] != b"[DONE]":
        server.wait(server.is_idle)  # nobody follows: the engine holds nothing of it
        num_left += 1
        last = f"last-event-id: {events[-1][0].decode()}"
        more = read_some(server, keyed(body, path, last), 20)
        assert more
        events += more
    ids = [int(event_id.rpartition(b"-")[2]) for event_id, _ in events[:-1]]
    assert ids == list(range(len(ids)))
    assert said(events) == whole
    replayed = events_in(server.exchange(keyed(body, path)))
    assert replayed == events
    return num_left


@pytest.mark.parametrize("name", SHAPES)
def test_d01_stream_with_a_key_goes_on_behind_the_last_event(start, name):
    path, fields = SHAPES[name]
    with start() as server:
        reference = server.canary()
        check_comes_back(server, path, {**SAMPLING, **fields})
        assert server.canary() == reference


@pytest.mark.parametrize("name", ["two prompts, two choices", "chat"])
def test_d01_stream_that_is_left_in_its_middle_costs_nothing_and_loses_nothing(start, name):
    path, fields = SHAPES[name]
    fields = {**fields, "logprobs": None, "top_logprobs": None}
    with start(is_scripted=True, pace_s=0.004, num_blocks=96) as server:
        assert check_comes_back(server, path, {**SAMPLING, **fields}) > 1


def test_d01_stream_that_nobody_comes_back_to_is_gone_after_the_window(start):
    body = {"prompt": "once", **SAMPLING}
    flags = ("--resume-window", "0")
    with start(is_scripted=True, pace_s=0.01, num_blocks=96, flags=flags) as server:
        events = read_some(server, keyed(body, COMPLETIONS), 3)
        server.wait(server.is_idle)
        last = {"idempotency-key": "k-1", "last-event-id": events[-1][0].decode()}
        answer = server.post(COMPLETIONS, body, headers=last)
        assert answer.check_refusal(410, "last-event-id")["code"] == "resume_window_expired"


def test_d02_answer_that_was_left_is_finished_by_the_next_request(start):
    body = {"prompt": "once", **SAMPLING, "stream": False, "return_token_ids": True}
    with start(is_scripted=True, pace_s=0.004, num_blocks=96) as server:
        alone = server.post(COMPLETIONS, body).token_ids
        with server.connect() as client:
            client.sendall(keyed(body, COMPLETIONS))
            server.wait(lambda: server.engine()["num_requests_running"] > 0)
        server.wait(server.is_idle)
        answer = server.post(COMPLETIONS, body, headers={"idempotency-key": "k-1"})
        assert answer.headers["idempotent-replayed"] == "true"
        assert answer.token_ids == alone


def test_d05_same_idempotency_key_at_once_runs_once(live):
    body = {"prompt": "twice", "max_tokens": 40, "temperature": 1, "return_token_ids": True}
    headers = {"idempotency-key": "d05"}
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(live.post, COMPLETIONS, body, headers=headers) for _ in range(8)]
        answers = [post.result() for post in posts]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    other = live.post(COMPLETIONS, {**body, "prompt": "x"}, headers=headers)
    assert other.check_refusal(409)["code"] == "idempotency_key_reused"
    bobs = live.post(COMPLETIONS, {**body, "prompt": "x"}, headers=headers, key=OTHER_KEY)
    assert bobs.status == 200
    assert "idempotent-replayed" not in bobs.headers


@pytest.fixture
def limited(start, tmp_path):
    """A server whose first key has quotas, and whose keys have salts."""
    keys = tmp_path / "limited.toml"
    keys.write_text(
        f'[alice]\nkey = "{KEY}"\ncache_salt = "a"\nrequests_per_minute = 1000\n'
        f'tokens_per_minute = 100000\nmax_concurrent = 4\n[bob]\nkey = "{OTHER_KEY}"\n'
    )
    with start(flags=("--api-key-file", str(keys))) as server:
        yield server


def test_d04_flood_beyond_a_quota_is_refused_at_once_and_others_are_served(limited):
    body = {"prompt": "flood", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: limited.post(COMPLETIONS, body), range(120)))
        bob = limited.complete("bob", key=OTHER_KEY)
    assert bob.status == 200
    assert "x-ratelimit-limit-requests" not in bob.headers
    statuses = {answer.status for answer in answers}
    assert statuses <= {200, 429}
    assert 429 in statuses
    for answer in answers:
        for what, limit in (("requests", 1000), ("tokens", 100_000)):
            assert answer.headers[f"x-ratelimit-limit-{what}"] == str(limit)
            assert 0 <= int(answer.headers[f"x-ratelimit-remaining-{what}"]) <= limit
            assert re.fullmatch(
                r"(\d+m)?[\d.]+s|\d+ms", answer.headers[f"x-ratelimit-reset-{what}"]
            )
        if answer.status == 429:
            error = answer.check_refusal(429)
            assert error["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after-ms"]) > 0
            assert int(answer.headers["retry-after"]) > 0
    assert limited.complete("alice").status == 200  # every place was left


def test_d10_keys_with_salts_of_their_own_share_no_prefix(limited):
    def num_cached(key: str, **fields) -> int:
        answer = limited.complete("a long story " * 8, key=key, max_tokens=1, **fields)
        return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert num_cached(KEY) == 0
    assert num_cached(KEY) > 0
    assert num_cached(OTHER_KEY) == 0
    assert num_cached(OTHER_KEY, cache_salt="a") == 0
    assert num_cached(KEY, cache_salt="b") == 0
