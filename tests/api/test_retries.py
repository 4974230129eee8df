"""Idempotency keys: who joins, what is replayed, what is refused, what is parked and continued."""

import asyncio
import contextlib
import json
import re

import pytest

from app.api.openapi import openapi_document
from app.engine.engine import Engine, EngineOptions
from app.errors import IdempotencyConflict, Overloaded, ServiceError
from app.serving.runs import RunRequest, RunStore
from app.settings import ApiKey
from tests.api.serve import client_of, run
from tests.engine.drive import make_limits
from tests.fake_engine import VOCAB, FakeEngine, says
from tests.fake_runner import FakeRunner

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": "abc", "max_tokens": 10}
KEYED = {"idempotency-key": "k 1"}


def real_engine(on_launch=None) -> Engine:
    """The engine with its thread over a scripted runner, for the tokenizer of bytes."""
    limits = make_limits(
        vocab_size=VOCAB, max_model_len=1024, num_blocks=512, max_num_batched_tokens=64
    )
    return Engine(FakeRunner(limits, on_launch=on_launch), EngineOptions())


@contextlib.asynccontextmanager
async def serving(engine, **options):
    """A client of the application over an engine that runs."""
    async with client_of(engine, **options) as client:
        engine.start()
        try:
            yield client
        finally:
            await engine.shutdown()


def parsed(text: str) -> list[tuple[str | None, str]]:
    """Id and data of each event."""
    found = []
    for event in text.split("\n\n"):
        match = re.fullmatch(r"(?:id: (.*)\n)?data: (.*)", event)
        if match:
            found.append((match[1], match[2]))
    return found


def test_repeated_request_joins_the_one_that_runs_and_then_gets_the_stored_answer():
    async def scenario():
        engine = FakeEngine(says("hello"))
        engine.gate.clear()
        async with client_of(engine) as client:
            posts = [
                asyncio.ensure_future(client.post(COMPLETIONS, json=BODY, headers=KEYED))
                for _ in range(3)
            ]
            while not engine.requests:
                await asyncio.sleep(0)
            engine.gate.set()
            answers = [await post for post in posts]
            spelt = {"max_tokens": 10, "prompt": "abc", "n": None}  # the same, spelt otherwise
            engine.is_full = True  # what is there already needs no place
            answers.append(await client.post(COMPLETIONS, json=spelt, headers=KEYED))
            other = {"idempotency-key": "k 2"}
            assert (await client.post(COMPLETIONS, json=BODY, headers=other)).status_code == 503
        assert len(engine.requests) == 1
        assert [answer.status_code for answer in answers] == [200] * 4
        assert {answer.content for answer in answers} == {answers[0].content}
        assert answers[0].json()["choices"][0]["text"] == "hello"
        replayed = [answer.headers.get("idempotent-replayed") for answer in answers]
        assert replayed == [None, "true", "true", "true"]

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "abd", "max_tokens": 10}),
        (COMPLETIONS, {**BODY, "stream": True}),
        (COMPLETIONS, {**BODY, "unknown": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "abc"}]}),
    ],
)
def test_same_key_with_another_body_is_a_conflict(path, body):
    async def scenario():
        engine = FakeEngine(says("hello"))
        async with client_of(engine) as client:
            await client.post(COMPLETIONS, json=BODY, headers=KEYED)
            answer = await client.post(path, json=body, headers=KEYED)
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert error["code"] == "idempotency_key_reused"
        assert error["param"] == "idempotency-key"
        assert answer.headers["x-should-retry"] == "false"
        assert len(engine.requests) == 1

    run(scenario())


def test_keys_of_two_tenants_have_nothing_to_do_with_each_other():
    async def scenario():
        engine = FakeEngine(says("hello"))
        keys = (ApiKey(name="alice", key="a"), ApiKey(name="bob", key="b"))
        async with client_of(engine, named_keys=keys) as client:
            statuses = []
            for key, body in (("a", BODY), ("b", {**BODY, "prompt": "x"}), ("b", BODY)):
                headers = {**KEYED, "authorization": f"Bearer {key}"}
                answer = await client.post(COMPLETIONS, json=body, headers=headers)
                assert "idempotent-replayed" not in answer.headers
                statuses.append(answer.status_code)
        assert statuses == [200, 200, 409]
        assert len(engine.requests) == 2

    run(scenario())


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ([(b"idempotency-key", b"")], "idempotency-key"),
        ([(b"idempotency-key", b"x" * 256)], "idempotency-key"),
        ([(b"idempotency-key", b"a\xc3\xa9")], "idempotency-key"),
        ([(b"idempotency-key", b"a\tb")], "idempotency-key"),
        ([(b"idempotency-key", b"a"), (b"idempotency-key", b"a")], "idempotency-key"),
        ([(b"last-event-id", b"1")], "last-event-id"),
        ([(b"idempotency-key", b"a"), (b"last-event-id", b"1")], "last-event-id"),
    ],
)
def test_bad_key_or_event_id_is_refused_and_nothing_runs(headers, param):
    async def scenario():
        engine = FakeEngine(says("hello"))
        async with client_of(engine) as client:
            answer = await client.post(COMPLETIONS, json=BODY, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert not engine.requests

    run(scenario())


def test_what_failed_is_forgotten_and_a_retry_tries_again():
    async def scenario():
        engine = FakeEngine(says("hello"))
        async with client_of(engine) as client:
            engine.error = "broken"
            first = await client.post(COMPLETIONS, json=BODY, headers=KEYED)
            assert first.status_code == 500
            bad = await client.post(
                COMPLETIONS, json={**BODY, "prompt": ""}, headers={"idempotency-key": "bad"}
            )
            assert bad.status_code == 400
            engine.error = None
            assert (await client.post(COMPLETIONS, json=BODY, headers=KEYED)).status_code == 200

    run(scenario())


SHAPES = {
    "completion": (COMPLETIONS, {"prompt": "abc", "max_tokens": 30, "logprobs": None}),
    "two prompts, three choices": (
        COMPLETIONS,
        {"prompt": ["abc", "d"], "n": 3, "max_tokens": 12, "return_token_ids": True},
    ),
    "echo and usage": (
        COMPLETIONS,
        {
            "prompt": "abc",
            "echo": True,
            "max_tokens": 12,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "n": 2}),
    "tools": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 30,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ),
}
SAMPLING = {"stream": True, "temperature": 1.0, "seed": 4, "ignore_eos": True}


def without_run(data: str) -> object:
    """What an event says, but for what differs between two runs of the same request."""
    if data == "[DONE]":
        return data
    event = json.loads(data)
    del event["id"], event["created"]
    return event


def joined(events: list[tuple[str | None, str]]) -> list[object]:
    """What a stream says of each choice; how its text is cut into events depends on the clock."""
    said: dict[int, list[object]] = {}
    for event in (without_run(data) for _, data in events if data != "[DONE]"):
        for choice in event["choices"]:
            delta = choice.get("delta", {})
            text = choice.get("text") or delta.get("content") or ""
            parts = said.setdefault(choice["index"], ["", [], None])
            parts[0] += text
            parts[1] += choice.get("token_ids") or ()
            parts[2] = choice["finish_reason"]
    return sorted(said.items())


async def read_until(client, path, body, headers, num_events: int):
    """Read so many events of a stream, then go away in the middle of it."""
    text = ""
    async with client.stream("POST", path, json=body, headers=headers) as response:
        async for part in response.aiter_text():
            text += part
            if len(parsed(text)) >= num_events:
                break
    return parsed(text)


@pytest.mark.parametrize("name", SHAPES)
def test_whole_stream_is_replayed_and_continued_behind_any_event(name):
    async def scenario():
        path, fields = SHAPES[name]
        body = {**fields, **SAMPLING}
        async with serving(real_engine()) as client:
            plain = await client.post(path, json=body)
            assert "id: " not in plain.text
            first = await client.post(path, json=body, headers=KEYED)
            events = parsed(first.text)
            assert joined(events) == joined(parsed(plain.text))
            ids = [event_id for event_id, _ in events]
            assert len(set(ids)) == len(ids)
            assert ids[-1] is None
            assert events[-1][1] == "[DONE]"
            again = await client.post(path, json=body, headers=KEYED)
            assert again.text == first.text
            for place, event_id in enumerate(ids[:-1]):
                rest = await client.post(
                    path, json=body, headers={**KEYED, "last-event-id": event_id}
                )
                assert parsed(rest.text) == events[place + 1 :]

    run(scenario())


def test_event_that_nobody_sent_is_gone_not_wrong():
    async def scenario():
        engine = FakeEngine(says("hello"))
        async with client_of(engine) as client:
            body = {**BODY, "stream": True}
            fresh = await client.post(
                COMPLETIONS, json=body, headers={**KEYED, "last-event-id": "0"}
            )
            assert fresh.status_code == 410
            assert not engine.requests
            first = await client.post(COMPLETIONS, json=body, headers=KEYED)
            run_id = parsed(first.text)[0][0].partition("-")[0]
            for given in ("0", f"{run_id}-", f"{run_id}-99", f"{run_id}--1", "x-0", "²-²"):
                headers = {**KEYED, "last-event-id": given.encode()}
                answer = await client.post(COMPLETIONS, json=body, headers=headers)
                assert answer.status_code == 410
                assert answer.json()["error"]["code"] == "resume_window_expired"

    run(scenario())


class Answer:
    """A resumable answer that says numbers as it is let go, and notes what is done with it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps: asyncio.Queue[int] = asyncio.Queue()
        self.refuses = False

    async def events(self):
        while (number := await self.steps.get()) >= 0:
            yield [b"%d" % number]

    async def body(self):
        return {"number": await self.steps.get()}

    def park(self) -> None:
        self.calls.append("park")

    async def resume(self) -> None:
        if self.refuses:
            raise Overloaded("no")
        self.calls.append("resume")

    def abort(self) -> None:
        self.calls.append("abort")

    def timing(self):
        return {}

    def num_tokens(self) -> int:
        return 7


class Runs:
    """A store, and requests for it."""

    def __init__(self, window_s: float = 1000.0, **bounds) -> None:
        self.now = 0.0
        self.store = RunStore(window_s, clock=lambda: self.now, **bounds)
        self.answers: list[Answer] = []
        self.settled: list[int] = []

    async def begin(self) -> Answer:
        self.answers.append(Answer())
        return self.answers[-1]

    async def follow(self, key: str, *, last: str | None = None, stream: bool = True):
        request = RunRequest(
            digest=b"d", is_stream=stream, begin=self.begin, settle=self.settled.append
        )
        followed = await self.store.follow(("", key), request, last)
        while not self.answers:
            await asyncio.sleep(0)
        return followed

    async def finish(self, key: str, event: int = 1):
        followed = await self.follow(key)
        await settle()
        self.answers[-1].steps.put_nowait(event)
        self.answers[-1].steps.put_nowait(-1)
        events = [event async for some in followed.events() for event in some]
        followed.abort()
        return events


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_last_to_leave_parks_a_run_and_the_next_one_resumes_it():
    async def scenario():
        runs = Runs()
        first, second = await runs.follow("a"), await runs.follow("a")
        (answer,) = runs.answers
        answer.steps.put_nowait(5)
        await settle()
        first.abort()
        first.abort()
        assert answer.calls == []
        second.abort()
        assert answer.calls == ["park"]
        answer.refuses = True
        with pytest.raises(Overloaded):
            await runs.follow("a")
        answer.refuses = False
        third = await runs.follow("a", last=f"{first.run_id}-0")
        assert answer.calls[-1] == "resume"
        answer.steps.put_nowait(6)
        answer.steps.put_nowait(-1)
        assert [event async for some in third.events() for event in some] == [b"6"]
        third.abort()
        assert answer.calls[-1] == "abort"
        assert runs.settled == [7]
        assert len(runs.store) == 1

    run(scenario())


def test_run_that_nobody_comes_back_to_is_given_up():
    async def scenario():
        runs = Runs(window_s=0.0)
        followed = await runs.follow("a")
        followed.abort()
        while len(runs.store):
            await asyncio.sleep(0)
        assert runs.answers[0].calls == ["park", "abort"]
        assert runs.settled == [7]

    run(scenario())


def test_store_is_bounded_by_count_bytes_and_age():
    async def scenario():
        runs = Runs(max_runs=3, max_bytes=40)
        for key in "abcd":
            await runs.finish(key)
        assert len(runs.store) == 3
        assert (await runs.follow("b")).is_replayed
        await runs.finish("long", 10**39)
        assert len(runs.store) == 1
        runs.now = 601.0
        await runs.finish("e")
        assert len(runs.store) == 1

    run(scenario())


def test_no_more_runs_at_once_than_the_store_holds():
    async def scenario():
        runs = Runs(max_runs=2)
        first, _ = await runs.follow("a"), await runs.follow("b")
        with pytest.raises(Overloaded):
            await runs.follow("c")
        first.abort()  # parked: it gives way
        await runs.follow("c")
        await settle()
        assert runs.answers[0].calls == ["park", "abort"]
        await runs.store.close()
        assert len(runs.store) == 0

    run(scenario())


def test_those_who_follow_are_told_when_the_server_ends():
    async def scenario():
        runs = Runs()
        followed = await runs.follow("a", stream=False)
        reading = asyncio.ensure_future(followed.body())
        await settle()
        await runs.store.close()
        with pytest.raises(ServiceError, match="shutting down"):
            await reading

    run(scenario())


def test_another_digest_is_a_conflict():
    async def scenario():
        runs = Runs()
        await runs.follow("a")
        other = RunRequest(
            digest=b"e", is_stream=True, begin=runs.begin, settle=runs.settled.append
        )
        with pytest.raises(IdempotencyConflict):
            await runs.store.follow(("", "a"), other, None)
        await runs.store.follow(("bob", "a"), other, None)
        await runs.store.close()

    run(scenario())


def test_document_names_the_headers():
    operation = openapi_document("1")["paths"][COMPLETIONS]["post"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert {"idempotency-key", "last-event-id"} <= names
    assert {"409", "410", "429"} <= set(operation["responses"])
