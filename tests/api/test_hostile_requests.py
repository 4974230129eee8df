"""Requests that were made to hurt: each ends in OpenAI's error shape, and none in a 500."""

import asyncio
import json
import time

import pytest

from tests.api.serve import client_of, run
from tests.fake_engine import VOCAB, FakeEngine, says

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


async def refusal(content: bytes, url: str = COMPLETIONS, status: int = 400, **options) -> dict:
    """Send raw bytes; return the error, which must have all its fields and reach no engine."""
    engine = FakeEngine(says("x"))
    async with client_of(engine, **options) as client:
        response = await client.post(url, content=content, headers=JSON)
    assert response.status_code == status, response.text[:300]
    assert response.headers["x-request-id"]
    assert len(response.content) < 4096
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    assert not engine.requests
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "model": "\\udfff"}',
        b'{"prompt": "a", "stop": ["\\ud800x"]}',
        b'{"prompt": "\xff"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b'{"a":' * 100_000,
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "max_tokens": 1e300}',
    ],
    ids=range(17),
)
def test_broken_json_is_a_400(body):
    run(refusal(body))


FAULTS = [
    *[("temperature", value) for value in (-0.1, 2.1, True, "0.5", "nan", [], {})],
    *[("top_p", value) for value in (-0.1, 1.1, "1")],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0, 2.1)],
    *[("top_k", value) for value in (-5, 1.5, True, 2**63)],
    *[("max_tokens", value) for value in (-1, 2**31, 2**63, 5.0, "5", True)],
    *[("n", value) for value in (0, -1, 129, 10**30, True)],
    *[("seed", value) for value in (2**70, 1.5, "1", True)],
    *[("stop", value) for value in (["a"] * 5, ["a"] * 100_000, "", [""], [1], "x" * 10**6, 5)],
    *[("logit_bias", value) for value in ({"abc": 1}, {"-1": 1}, {str(VOCAB): 1}, {"1": 101})],
    ("logit_bias", {str(place): 1 for place in range(2000)}),
    *[("stop_token_ids", value) for value in ([-1], [2**63], [True], "a")],
    *[("allowed_token_ids", value) for value in ([], [VOCAB], [-1])],
    *[("stream", value) for value in (1, "true")],
    *[("model", value) for value in (1, "")],
]


@pytest.mark.parametrize(("field", "value"), FAULTS, ids=range(len(FAULTS)))
@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_value_out_of_range_is_a_400_that_names_the_field(url, field, value):
    body = {"prompt": "a"} if url == COMPLETIONS else HELLO
    error = asyncio.run(refusal(json.dumps({**body, field: value}).encode(), url))
    assert error["param"].partition(".")[0] == field
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "prompt",
    [None, [], [[]], [[5], []], [-1], [VOCAB], [2**63], [True], [1.0], {}, 5, ["a", 1], [[1], "a"]],
    ids=repr,
)
def test_prompt_of_no_shape_is_a_400_that_names_it(prompt):
    error = asyncio.run(refusal(json.dumps({"prompt": prompt}).encode()))
    assert error["param"] == "prompt"


@pytest.mark.parametrize("logprobs", [21, -1, 10**9])
def test_too_many_logprobs_are_refused(logprobs):
    body = json.dumps({"prompt": "a", "logprobs": logprobs}).encode()
    assert asyncio.run(refusal(body))["param"] == "logprobs"
    chat = json.dumps({**HELLO, "logprobs": True, "top_logprobs": logprobs}).encode()
    assert asyncio.run(refusal(chat, CHAT))["param"] == "top_logprobs"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"),
        ("functions", [{"name": "f"}]),
        ("use_beam_search", True),
        ("chat_template", "{{ 1 }}"),
        ("prompt_embeds", "AAAA"),
    ],
)
def test_known_field_that_is_not_done_is_refused_by_name(field, value):
    error = asyncio.run(refusal(json.dumps({**HELLO, field: value}).encode(), CHAT))
    assert error["param"] == field


def test_message_of_an_unknown_role_is_named_by_its_place():
    body = json.dumps({"messages": [{"role": "martian", "content": "hi"}]}).encode()
    assert asyncio.run(refusal(body, CHAT))["param"] == "messages.0.role"


BOMBS = {
    "prompt": {"prompt": [[1]] * 200_000 + ["x"]},
    "bias": {"prompt": "a", "logit_bias": {str(place): "x" for place in range(80_000)}},
    "messages": {"messages": [5] * 400_000},
    "kwargs": {**HELLO, "chat_template_kwargs": {str(place): [] for place in range(80_000)}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_validation_bomb_is_refused_at_once_and_holds_nobody_up(name):
    bomb = json.dumps(BOMBS[name]).encode()
    url = COMPLETIONS if "prompt" in BOMBS[name] else CHAT

    async def scenario():
        longest = 0.0

        async def watch():
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.005)
                longest = max(longest, time.monotonic() - before)

        watcher = asyncio.ensure_future(watch())
        started = time.monotonic()
        await refusal(bomb, url)
        took = time.monotonic() - started
        await asyncio.sleep(0.02)  # a tick that is late must still be counted
        assert longest > 0
        watcher.cancel()
        assert took < 5.0  # 0.5 s on an idle machine
        assert longest < 0.5  # 0.2 s is asked for; the rest allows for a shared machine

    run(scenario())


def test_body_over_the_cap_is_a_413_whether_or_not_its_length_is_told():
    async def scenario():
        await refusal(b"x" * 2000, status=413, max_request_bytes=1000)

        async def endless():
            while True:
                yield b" " * 600

        async with client_of(FakeEngine(says("x")), max_request_bytes=1000) as client:
            response = await client.post(COMPLETIONS, content=endless(), headers=JSON)
        assert response.status_code == 413

    run(scenario())


def test_body_that_is_not_json_is_a_415():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.post(
                COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}
            )
        assert response.status_code == 415
        assert response.json()["error"]["type"] == "invalid_request_error"

    run(scenario())


@pytest.mark.parametrize(
    ("body", "culprit"),
    [({"prompt": "a" * 300}, "prompt"), ({"prompt": "a", "max_tokens": 256}, "max_tokens")],
)
def test_what_cannot_fit_the_context_says_so(body, culprit):
    error = asyncio.run(refusal(json.dumps(body).encode()))
    assert (error["code"], error["param"]) == ("context_length_exceeded", culprit)


@pytest.mark.parametrize("name", ["nope", "../../etc/passwd", "x" * 10**6])
def test_unknown_model_is_a_short_404(name):
    body = json.dumps({"prompt": "a", "model": name}).encode()
    status = 404 if len(name) <= 4096 else 400
    error = asyncio.run(refusal(body, status=status))
    assert error["code"] == "model_not_found" if status == 404 else error["param"] == "model"


def test_odd_but_legal_text_is_served():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            for text in ("\x00", "\u202eabc", "a\u200db", "e" + "\u0301" * 50):
                response = await client.post(COMPLETIONS, json={"prompt": text})
                assert response.status_code == 200

    run(scenario())
