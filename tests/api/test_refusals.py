"""What is refused before the engine sees it, because it could only fail there."""

import asyncio
import logging

import pytest

from app.cli import parse
from app.settings import ApiKey, read_environment
from tests.api.serve import client_of, run
from tests.fake_engine import EOS, VOCAB, FakeEngine, says


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [EOS], "min_tokens": 4}, "allowed_token_ids"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
        ({"stop_token_ids": list(range(VOCAB)), "min_tokens": 4}, "stop_token_ids"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"prompt": ["a"] * 9, "n": 128}, "n"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
def test_what_the_engine_could_only_fail_is_a_400(fields, param):
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            response = await client.post("/v1/completions", json={"prompt": "a", **fields})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert engine.requests == []

    run(scenario())


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS]},
        {"allowed_token_ids": [97, 98], "bad_words": ["a"]},
        {"stop_token_ids": list(range(VOCAB))},
        {"prompt": ["a"] * 8, "n": 128},
        {"store": False, "service_tier": "auto"},
    ],
)
def test_what_leaves_something_to_choose_is_served(fields):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.post("/v1/completions", json={"prompt": "a", **fields})
        assert response.status_code == 200

    run(scenario())


def test_empty_key_opens_nothing(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["serve", "model", "--api-key", ""], read_environment())
    assert left.value.code == 2
    assert "--api-key is empty" in capsys.readouterr().err

    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=("",)) as client:
            for header in ("Bearer", "Bearer ", "bearer  "):
                response = await client.get("/version", headers={"authorization": header})
                assert response.status_code == 401

    run(scenario())


def test_what_a_shutdown_cuts_off_may_be_retried_elsewhere():
    async def scenario():
        engine = FakeEngine(says("x"))
        engine.gate.clear()
        async with client_of(engine) as client:
            body = {"prompt": "a"}
            whole = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while not engine.streams:
                await asyncio.sleep(0)
            engine.error, engine.is_draining = "the server is shutting down", True
            engine.gate.set()
            response = await whole
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shutting_down"
        assert response.headers["x-should-retry"] == "true"

    run(scenario())


@pytest.mark.parametrize(("fields", "is_logged"), [({}, True), ({"temperature": 0}, False)])
def test_drawn_seed_is_logged_with_the_request(caplog, fields, is_logged):
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            await client.post("/v1/completions", json={"prompt": "a", **fields})
        seed = engine.requests[0].sampling[0].seed
        assert (f"seed {seed}" in caplog.text) is is_logged

    with caplog.at_level(logging.INFO, logger="app.serving.generation"):
        run(scenario())


def test_other_requests_get_a_turn_between_the_prompts_of_a_long_list():
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            long = client.post("/v1/completions", json={"prompt": ["abc"] * 200, "max_tokens": 1})
            pending = asyncio.ensure_future(long)
            await asyncio.sleep(0)
            health = await client.get("/health")
            assert health.status_code == 200
            assert engine.requests == []
            assert (await pending).status_code == 200

    run(scenario())


FULL_BODIES = [b'{"prompt": "a"}', b"{", b'{"prompt": 1.5}']


@pytest.mark.parametrize("content", FULL_BODIES)
def test_full_queue_refuses_whatever_the_body_says(content):
    async def scenario():
        engine = FakeEngine(says("x"))
        key = ApiKey(name="alice", key="a", requests_per_minute=60)
        async with client_of(engine, named_keys=(key,)) as client:

            async def ask(path: str = "/v1/completions"):
                headers = {"authorization": "Bearer a", "content-type": "application/json"}
                return await client.post(path, content=content, headers=headers)

            normal = await ask()
            engine.is_full = True
            refused = await ask()
            asked_only = await ask("/v1/completions?dry_run=1")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-limit-requests"] == "60"
        assert asked_only.status_code == normal.status_code == (200 if b"a" in content else 400)

    run(scenario())
