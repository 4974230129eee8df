"""POST /v1/completions, streamed and not, over a scripted engine."""

import asyncio
import json

import pytest

from tests.api.serve import client_of, events, run
from tests.fake_engine import FakeEngine, says

URL = "/v1/completions"


async def post(engine: FakeEngine, body: dict, url: str = URL, **options):
    async with client_of(engine, **options) as client:
        return await client.post(url, json=body)


def test_answer_has_openais_form():
    async def scenario():
        response = await post(FakeEngine(says("Hello")), {"prompt": "Say", "model": "fake"})
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "text_completion"
        assert body["model"] == "fake"
        assert body["choices"] == [
            {
                "index": 0,
                "text": "Hello",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 6,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
        }

    run(scenario())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompt_comes_in_four_shapes(prompt, expected):
    async def scenario():
        engine = FakeEngine(says("x"))
        response = await post(engine, {"prompt": prompt})
        assert [list(request.prompt_token_ids) for request in engine.requests] == expected
        assert [choice["index"] for choice in response.json()["choices"]] == list(
            range(len(expected))
        )

    run(scenario())


@pytest.mark.parametrize("merged", [1, 3, 100])
@pytest.mark.parametrize("text", ["Hello, world", "naïve — 日本語 🦙!", ""])
def test_streamed_text_is_the_text_of_the_whole_answer(merged, text):
    async def scenario():
        body = {"prompt": "a", "n": 2, "max_tokens": 100, "logprobs": 1}
        whole = (await post(FakeEngine(says(text), merged=merged), body)).json()
        streamed = await post(FakeEngine(says(text), merged=merged), {**body, "stream": True})
        chunks = events(streamed.text)
        for index in range(2):
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in mine) == text
            assert whole["choices"][index]["text"] == text
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
            tokens = [t for choice in mine for t in choice["logprobs"]["tokens"]]
            assert tokens == whole["choices"][index]["logprobs"]["tokens"]

    run(scenario())


@pytest.mark.parametrize("merged", [1, 2, 100])
def test_stop_string_cuts_text_and_usage_and_ends_the_sequence(merged):
    async def scenario():
        engine = FakeEngine(says("one two three"), merged=merged)
        body = (await post(engine, {"prompt": "a", "stop": [" tw"], "max_tokens": 50})).json()
        assert body["choices"][0]["text"] == "one"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["choices"][0]["stop_reason"] == " tw"
        assert body["usage"]["completion_tokens"] == 6
        assert engine.streams[0].finished == {0}

    run(scenario())


def test_stop_string_can_be_kept():
    async def scenario():
        body = {"prompt": "a", "stop": "tw", "include_stop_str_in_output": True, "max_tokens": 50}
        answer = (await post(FakeEngine(says("one two")), body)).json()
        assert answer["choices"][0]["text"] == "one tw"

    run(scenario())


def test_named_stop_token_is_told_and_its_text_is_not_given():
    async def scenario():
        body = {"prompt": "a", "stop_token_ids": [ord("l")]}
        answer = (await post(FakeEngine(says("Hello")), body)).json()
        assert answer["choices"][0]["text"] == "He"
        assert answer["choices"][0]["stop_reason"] == ord("l")
        assert answer["usage"]["completion_tokens"] == 3

    run(scenario())


def test_ignored_end_of_text_is_no_stop():
    async def scenario():
        engine = FakeEngine(lambda request, sampling: [104, 257, 105])
        answer = (await post(engine, {"prompt": "a", "ignore_eos": True, "max_tokens": 3})).json()
        assert answer["choices"][0]["text"] == "hi"
        assert answer["choices"][0]["finish_reason"] == "length"

    run(scenario())


def test_echo_with_logprobs_scores_the_prompt_and_nulls_its_first_token():
    async def scenario():
        engine = FakeEngine(says("xy"))
        body = {"prompt": "ab", "echo": True, "logprobs": 2, "max_tokens": 1}
        choice = (await post(engine, body)).json()["choices"][0]
        assert choice["text"] == "abx"
        assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "x"]
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert not engine.requests[0].read_prefix_cache

    run(scenario())


def test_usage_is_summed_over_prompts_and_choices_and_streamed_on_demand():
    async def scenario():
        body = {
            "prompt": ["a", "bc"],
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        response = await post(FakeEngine(says("xyz")), body)
        last = events(response.text)[-1]
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens"] == 5
        assert last["usage"]["completion_tokens"] == 4 * 4

    run(scenario())


def test_choices_share_a_drawn_seed_and_differ_by_their_index():
    async def scenario():
        engine = FakeEngine(says("x"))
        await post(engine, {"prompt": "a", "n": 3})
        sampling = engine.requests[0].sampling
        assert len({params.seed for params in sampling}) == 1
        assert [params.choice for params in sampling] == [0, 1, 2]

    run(scenario())


def test_unknown_fields_are_named_and_harmless_ones_are_not():
    async def scenario():
        body = {"prompt": "a", "frobnicate": 1, "user": "me", "x\ny": 2}
        response = await post(FakeEngine(says("x")), body)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "frobnicate, x_y"

    run(scenario())


def test_failure_before_the_first_byte_is_a_500_and_after_it_an_event():
    async def scenario():
        engine = FakeEngine(says("x"))
        engine.error = "the step failed"
        response = await post(engine, {"prompt": "a"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"
        streamed = await post(engine, {"prompt": "a", "stream": True})
        assert '"error":{"message":"the step failed"' in streamed.text
        assert "[DONE]" not in streamed.text

    run(scenario())


def test_stream_headers_forbid_buffering():
    async def scenario():
        response = await post(FakeEngine(says("x")), {"prompt": "a", "stream": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"

    run(scenario())


def test_keep_alive_comments_fill_a_silence_without_losing_an_event():
    from app.api.sse import send_kept_alive

    async def scenario():
        gate = asyncio.Event()

        async def lines():
            yield b"one"
            await gate.wait()
            yield b"two"

        seen = []

        async def send(line):
            seen.append(line)
            if line.startswith(b":"):
                gate.set()

        await send_kept_alive(lines(), send, 0.01)
        assert seen[0] == b"one"
        assert seen[-1] == b"two"
        assert b": keep-alive\n\n" in seen

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_answer_says_what_took_how_long(stream):
    async def scenario():
        response = await post(FakeEngine(says("abc")), {"prompt": "a", "stream": stream})
        timings = response.headers["server-timing"].replace(" ", "").split(",")
        durations = dict(timing.split(";dur=") for timing in timings)
        assert set(durations) == ({"total"} if stream else {"ttft", "decode", "total"})
        assert all(float(duration) >= 0 for duration in durations.values())

    run(scenario())


def test_request_whose_time_is_over_is_aborted_and_told_so():
    async def scenario():
        engine = FakeEngine(says("abc"))
        engine.gate.clear()
        async with client_of(engine) as client:
            for stream in (False, True):
                posted = client.post(
                    URL,
                    json={"prompt": "a", "stream": stream},
                    headers={"x-request-timeout": "0.05"},
                )
                asking = asyncio.create_task(posted)
                while len(engine.streams) <= stream:
                    await asyncio.sleep(0)
                await engine.streams[-1].was_aborted.wait()
                response = await asking
                if stream:
                    error = json.loads(response.text.removeprefix("data: "))["error"]
                else:
                    assert response.status_code == 504
                    error = response.json()["error"]
                assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")

    run(scenario())


@pytest.mark.parametrize("value", ["0", "-1", "1e3", "nan", "inf", "a", "", "99999999"])
def test_timeout_that_is_no_time_is_refused(value):
    async def scenario():
        engine = FakeEngine(says("abc"))
        async with client_of(engine) as client:
            headers = {"x-request-timeout": value}
            response = await client.post(URL, json={"prompt": "a"}, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "x-request-timeout"
        assert engine.requests == []

    run(scenario())
