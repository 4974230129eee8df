"""Requests as they are drawn and paced, and answers as they are read off the wire."""

import itertools
import json
import math
import statistics

import pytest

from app.bench.load import CHAT, WORDS, Drafts, Pace, Shape, arrivals
from app.bench.peer import PeerFault
from app.bench.wire import Address, Exchange

SHAPE = Shape(model="m", input_len=20, output_len=10)


def test_prompts_have_their_length_and_are_never_the_same():
    drafts = Drafts(SHAPE, seed=0)
    prompts = [tuple(drafts.draw().request.body["prompt"]) for _ in range(50)]
    assert {len(prompt) for prompt in prompts} == {20}
    assert len(set(prompts)) == 50
    assert all(300 <= token < 30_000 for prompt in prompts for token in prompt)


def test_same_seed_same_requests():
    first, second = (Drafts(SHAPE, seed=3).draw().request.body for _ in range(2))
    assert first == second


def test_all_prompts_begin_with_the_shared_prefix():
    drafts = Drafts(Shape(model="m", input_len=4, prefix_len=30), seed=0)
    prompts = [drafts.draw().request.body["prompt"] for _ in range(10)]
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 10
    assert {len(prompt) for prompt in prompts} == {34}


def test_lengths_vary_by_the_ratio():
    drafts = Drafts(Shape(model="m", input_len=100, output_len=20, range_ratio=0.5), seed=0)
    drawn = [drafts.draw() for _ in range(300)]
    assert (min(d.num_input for d in drawn), max(d.num_input for d in drawn)) == (50, 150)
    assert (min(d.num_output for d in drawn), max(d.num_output for d in drawn)) == (10, 30)
    assert all(d.request.body["max_tokens"] == d.num_output for d in drawn)


def test_full_length_is_asked_for_unless_the_end_counts():
    body = Drafts(SHAPE, 0).draw().request.body
    assert (body["min_tokens"], body["ignore_eos"]) == (10, True)
    body = Drafts(Shape(model="m", ignore_eos=False), 0).draw().request.body
    assert not {"min_tokens", "ignore_eos"} & set(body)


def test_chat_gets_a_word_a_token():
    shape = Shape(model="m", endpoint=CHAT, input_len=7, extra_body={"user": "u"})
    request = Drafts(shape, seed=0).draw().request
    (message,) = request.body["messages"]
    words = message["content"].split()
    assert len(words) == 7
    assert set(words) <= set(WORDS.split())
    assert (request.path, request.body["user"]) == (CHAT, "u")


def test_without_a_rate_all_are_due_at_once():
    assert list(arrivals(Pace(num_prompts=3), seed=0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_and_the_spread_of_their_distribution(burstiness, spread):
    pace = Pace(num_prompts=20_000, request_rate=50.0, burstiness=burstiness)
    due_s = list(arrivals(pace, seed=0))
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(due_s)]
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps_s) * 50 == pytest.approx(spread, rel=0.05)
    assert due_s[0] == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:8000", (False, "127.0.0.1", 8000, "")),
        ("https://api.example/proxy/v1/", (True, "api.example", 443, "/proxy")),
        ("http://[::1]:80/v1", (False, "::1", 80, "")),
    ],
)
def test_address_is_read(text, expected):
    address = Address.parse(text)
    assert (address.is_secure, address.host, address.port, address.prefix) == expected


@pytest.mark.parametrize("text", ["ftp://x", "localhost:8000", "http://", ""])
def test_address_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="is no http"):
        Address.parse(text)


def sse(*events: dict) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


TOKENS = [{"choices": [{"text": f" t{index}"}]} for index in range(3)]
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int = 10, *, is_whole: bool = True) -> bytes:
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n" * is_whole


def exchange_of(answer: bytes, cut: int) -> Exchange:
    """The answer as it arrives in pieces of `cut` bytes, one a second from second 1 on."""
    pieces = [answer[at : at + cut] for at in range(0, len(answer), cut)]
    parts = [(float(second), piece) for second, piece in enumerate(pieces, start=1)]
    return Exchange(started_s=0.0, ended_s=len(parts) + 1.0, parts=parts)


@pytest.mark.parametrize("cut", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_answer_is_read_however_it_was_cut(cut, is_chunked):
    body = sse(*TOKENS, USAGE) + DONE
    answer = chunked(body) if is_chunked else HEAD + b"\r\n" + body
    completion = exchange_of(answer, cut).completion(3)
    assert (completion.num_output_tokens, completion.num_prompt_tokens) == (3, 9)
    assert len(completion.arrivals_s) == 3
    assert list(completion.arrivals_s) == sorted(completion.arrivals_s)


def test_token_arrives_when_its_line_is_whole():
    first, second = sse(TOKENS[0]), sse(TOKENS[1])
    parts = [(1.0, HEAD + b"\r\n"), (2.0, first[:5]), (3.0, first[5:]), (4.0, second + DONE)]
    completion = Exchange(started_s=0.0, ended_s=5.0, parts=parts).completion()
    assert completion.arrivals_s == (3.0, 4.0)
    assert (completion.first_token_delay_s, completion.ended_s) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "no answer in HTTP"),
        (b"SSH-2.0-x\r\n\r\n", "no answer in HTTP"),
        (b"HTTP/1.1 503 Busy\r\n\r\nfull up", "answered 503: full up"),
        (HEAD + b"\r\n" + sse(*TOKENS), "the stream has no end"),
        (chunked(sse(*TOKENS), is_whole=False), "the stream has no end"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "its chunks cannot be read"),
        (chunked(sse(*TOKENS[:2]) + DONE), "answered 2 tokens where 3"),
        (chunked(sse(TOKENS[0], {"error": {"message": "out of memory"}})), "out of memory"),
    ],
)
def test_answer_that_cannot_be_trusted_is_a_fault(answer, reason):
    with pytest.raises(PeerFault, match=reason):
        exchange_of(answer, 11).completion(3)


def test_rate_of_infinity_is_the_default():
    assert math.isinf(Pace(num_prompts=1).request_rate)
