"""Tools and reasoning in chat, over an engine that says what its script says."""

import json

import pytest

from tests.api.serve import client_of, events, run
from tests.fake_engine import EOS, says
from tests.fake_engine import FakeEngine as ShortEngine

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
TWO_CALLS = (
    "Let me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris ü"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
)


class FakeEngine(ShortEngine):
    """With a context in which tools have room, a byte a token."""

    def __init__(self, script, **options):
        super().__init__(script, max_model_len=4096, **options)


async def chat(engine, body, **options):
    async with client_of(engine, **options) as client:
        return await client.post(URL, json={"messages": HELLO, "tools": [WEATHER, PING], **body})


def folded(chunks) -> dict:
    """What a reader of a stream makes of it."""
    message: dict = {"content": "", "reasoning": "", "calls": [], "reason": None}
    for chunk in chunks:
        choice = chunk["choices"][0]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning_content") or ""
        calls = delta.get("tool_calls", [])
        # openai 2.x takes the first list of fragments as it is, one call each.
        assert len({call["index"] for call in calls}) == len(calls)
        for call in calls:
            if "id" in call:
                assert call["index"] == len(message["calls"])
                message["calls"].append([call["function"]["name"], ""])
            message["calls"][call["index"]][1] += call["function"]["arguments"]
        message["reason"] = choice["finish_reason"] or message["reason"]
    return message


@pytest.mark.parametrize("merged", [1, 3, 1000])
def test_calls_are_told_whole_and_streamed_alike(merged):
    async def scenario():
        response = await chat(FakeEngine(says(TWO_CALLS), merged=merged), {})
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["content"] == "Let me look."
        calls = message["tool_calls"]
        assert [call["type"] for call in calls] == ["function", "function"]
        assert len({call["id"] for call in calls}) == 2
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Paris ü"}
        engine = FakeEngine(says(TWO_CALLS), merged=merged)
        stream = folded(events((await chat(engine, {"stream": True})).text))
        assert stream["content"] == message["content"]
        assert stream["reason"] == "tool_calls"
        assert stream["calls"] == [
            [call["function"]["name"], call["function"]["arguments"]] for call in calls
        ]

    run(scenario())


def test_arguments_stream_while_they_are_generated():
    async def scenario():
        text = (await chat(FakeEngine(says(TWO_CALLS)), {"stream": True})).text
        fragments = [
            call["function"]["arguments"]
            for chunk in events(text)
            for call in chunk["choices"][0]["delta"].get("tool_calls", ())
        ]
        assert len(fragments) > 10

    run(scenario())


def test_tools_reach_a_model_whose_template_knows_none():
    async def scenario():
        engine = FakeEngine(says("x"))
        await chat(engine, {})
        prompt = bytes(i for i in engine.requests[0].prompt_token_ids if i < 256).decode()
        assert prompt.startswith("system\n")
        assert '"name": "get_weather"' in prompt
        assert "<tool_call>" in prompt

    run(scenario())


def test_conversation_with_calls_and_results_is_told_again():
    async def scenario():
        engine = FakeEngine(says("x"))
        call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
        messages = [
            *HELLO,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
        response = await chat(engine, {"messages": messages})
        assert response.status_code == 200
        prompt = bytes(i for i in engine.requests[0].prompt_token_ids if i < 256).decode()
        assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt
        assert "<tool_response>\nsunny\n</tool_response>" in prompt

    run(scenario())


def test_tool_choice_none_shows_no_tools_and_reads_no_calls():
    async def scenario():
        engine = FakeEngine(says(TWO_CALLS))
        response = await chat(engine, {"tool_choice": "none"})
        message = response.json()["choices"][0]["message"]
        assert message["content"] == TWO_CALLS
        assert "tool_calls" not in message
        prompt = bytes(i for i in engine.requests[0].prompt_token_ids if i < 256)
        assert b"get_weather" not in prompt

    run(scenario())


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("required", {"get_weather", "ping"}),
        ({"type": "function", "function": {"name": "ping"}}, {"ping"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "ping"}}],
                },
            },
            {"ping"},
        ),
    ],
)
def test_forced_call_is_constrained_to_what_may_be_called(choice, allowed):
    async def scenario():
        engine = FakeEngine(says("x"))
        await chat(engine, {"tool_choice": choice})
        (constraint,) = engine.requests[0].constraints
        constraint.accept(list(b'<tool_call>\n{"name": "'))
        for name in ("get_weather", "ping"):
            ids = list(f'{name}"'.encode())
            assert (constraint.num_allowed(ids) == len(ids)) == (name in allowed)

    run(scenario())


def test_automatic_choice_is_not_constrained_but_reads_only_allowed_calls():
    async def scenario():
        engine = FakeEngine(says(TWO_CALLS))
        ping = {"type": "function", "function": {"name": "ping"}}
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [ping]}}
        response = await chat(engine, {"tool_choice": choice})
        assert engine.requests[0].constraints == ()
        calls = response.json()["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["ping"]

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("merged", [1, 1000])
def test_without_parallel_calls_the_first_one_ends_the_answer(stream, merged):
    async def scenario():
        engine = FakeEngine(says(TWO_CALLS), merged=merged)
        response = await chat(engine, {"parallel_tool_calls": False, "stream": stream})
        if merged == 1:
            assert engine.streams[0].finished == {0}
        if stream:
            message = folded(events(response.text))
            assert [name for name, _ in message["calls"]] == ["get_weather"]
            assert message["reason"] == "tool_calls"
        else:
            choice = response.json()["choices"][0]
            assert len(choice["message"]["tool_calls"]) == 1
            assert choice["finish_reason"] == "tool_calls"

    run(scenario())


def test_call_cut_by_length_says_so():
    async def scenario():
        engine = FakeEngine(says(TWO_CALLS))
        response = await chat(engine, {"max_tokens": 75})
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [PING, PING]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [PING] * 200}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_faulty_tools_are_named(fields, param):
    async def scenario():
        engine = FakeEngine(says("x"))
        response = await chat(engine, fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert engine.requests == []

    run(scenario())


def test_forced_call_cut_short_is_no_content_and_needs_no_form():
    async def scenario():
        engine = FakeEngine(says(TWO_CALLS.partition("\n")[2]))
        body = {"tool_choice": "required", "max_tokens": 20}
        response = await chat(engine, {**body, "response_format": {"type": "json_object"}})
        choice = response.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert not choice["message"]["content"]
        (constraint,) = engine.requests[0].constraints
        assert constraint.num_allowed(list(b"{}")) == 0

    run(scenario())


def test_answer_in_a_form_may_take_the_place_of_a_call():
    async def scenario():
        engine = FakeEngine(says("x"))
        schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        await chat(engine, {"response_format": form})
        (constraint,) = engine.requests[0].constraints
        for text in ('{"a":1}', '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'):
            assert constraint.num_allowed(list(text.encode())) == len(text)
        assert constraint.num_allowed(list(b'{"b":1}')) < 7
        assert constraint.num_allowed(list(b"words")) == 0

    run(scenario())


THOUGHT = "<think>\nHm, 2.\n</think>\n\nIt is 4."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [None, False])
def test_thoughts_are_parted_from_the_answer(stream, include):
    async def scenario():
        engine = FakeEngine(says(THOUGHT))
        body = {"tools": [], "stream": stream, "include_reasoning": include}
        response = await chat(engine, body, think_tags=("<think>", "</think>"))
        if stream:
            message = folded(events(response.text))
            content, reasoning = message["content"], message["reasoning"]
        else:
            wire = response.json()["choices"][0]["message"]
            assert wire.get("reasoning") == wire.get("reasoning_content")
            content, reasoning = wire["content"], wire.get("reasoning", "")
        assert content == "It is 4."
        assert reasoning == ("Hm, 2." if include is None else "")

    run(scenario())


@pytest.mark.parametrize("answer", ['{"a":1}', '<tool_call>\n{"name": "ping", "arguments": {}}\n'])
def test_constrained_answer_is_no_thought_where_the_prompt_has_opened_the_tag(answer):
    async def scenario():
        engine = FakeEngine(says(answer))
        schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = {
            "messages": [*HELLO, {"role": "assistant", "content": "<think>"}],
            "continue_final_message": True,
            "response_format": form,
        }
        response = await chat(engine, body, think_tags=("<think>", "</think>"))
        message = response.json()["choices"][0]["message"]
        assert "reasoning" not in message
        assert message["content"] == answer or message["tool_calls"]

    run(scenario())


def test_developer_is_the_system_where_a_template_does_not_know_it():
    async def scenario():
        engine = FakeEngine(lambda request, sampling: [EOS])
        messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
        await chat(engine, {"messages": messages, "tools": []})
        prompt = bytes(i for i in engine.requests[0].prompt_token_ids if i < 256)
        assert prompt.startswith(b"system\nBe brief.")

    run(scenario())
