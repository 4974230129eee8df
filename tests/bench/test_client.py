"""The client of the benchmark against a real server that plays a peer."""

import asyncio
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.bench.client import Completion
from app.bench.peer import PeerFault, completion_request
from app.bench.wire import Address, exchange
from app.bench.workload import output_rate
from tests.api.serve import real_server


def event(**fields) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def peer(chunks: list[str], status: int = 200) -> FastAPI:
    """A server that answers every completion with these chunks and keeps what it was asked."""
    app = FastAPI()
    app.state.bodies = []

    @app.post("/v1/completions")
    async def complete(request: Request):
        app.state.bodies.append(await request.json())
        if status != 200:
            return JSONResponse({"error": {"message": "no such model"}}, status)
        return StreamingResponse(iter(chunks), media_type="text/event-stream")

    return app


def ask(app: FastAPI, num_output: int) -> Completion:
    with real_server(app) as url:
        request = completion_request([300, 301], num_output)
        return asyncio.run(exchange(Address.parse(url), request, 60)).completion(num_output)


TOKENS = [event(choices=[{"text": " t300"}])] * 3
USAGE = event(choices=[], usage={"completion_tokens": 3})
END = "data: [DONE]\n\n"


def test_usage_is_what_counts():
    merged = [event(choices=[{"text": " t300 t301 t302"}]), USAGE, END]
    assert ask(peer(merged), 3).num_output_tokens == 3


def test_events_are_counted_where_there_is_no_usage():
    assert ask(peer([*TOKENS, END]), 3).num_output_tokens == 3


def test_instants_are_in_order():
    answer = ask(peer([*TOKENS, USAGE, END]), 3)
    instants = [answer.started_s, answer.first_token_s, answer.last_token_s, answer.ended_s]
    assert instants == sorted(instants)


def test_events_cut_anywhere_are_read():
    text = "".join([*TOKENS, USAGE, END])
    assert ask(peer([text[at : at + 7] for at in range(0, len(text), 7)]), 3).num_output_tokens == 3


def test_an_answer_without_text_ends_with_its_first_token():
    answer = ask(peer([event(choices=[{"text": ""}]), USAGE, END]), 3)
    assert answer.first_token_s == answer.ended_s


@pytest.mark.parametrize(
    ("chunks", "status", "reason"),
    [
        ([*TOKENS, USAGE, END], 200, "answered 3 tokens where 4 were asked for"),
        ([event(error={"message": "out of memory"})], 200, "out of memory"),
        ([], 404, "answered 404: .*no such model"),
    ],
)
def test_what_cannot_be_trusted_is_a_fault(chunks, status, reason):
    with pytest.raises(PeerFault, match=reason):
        ask(peer(chunks, status), 4)


def test_the_request_asks_for_a_fixed_greedy_length():
    app = peer([*TOKENS, USAGE, END])
    ask(app, 3)
    body = app.state.bodies[0]
    assert (body["prompt"], body["min_tokens"], body["max_tokens"]) == ([300, 301], 3, 3)
    assert (body["temperature"], body["ignore_eos"]) == (0, True)


def answer(started_s: float, ended_s: float, num_output: int) -> Completion:
    return Completion(
        started_s=started_s,
        first_token_s=started_s + 1,
        last_token_s=ended_s,
        ended_s=ended_s,
        num_output_tokens=num_output,
    )


def test_rate_of_a_batch_is_over_the_whole_of_it():
    assert output_rate([answer(0, 4, 64), answer(1, 8, 64)]) == 16


def test_rate_of_a_stream_leaves_its_first_token_out():
    assert answer(0, 5, 9).decode_tokens_per_s == 2
