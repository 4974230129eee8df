"""Fields beyond the plain ones: best_of, prompt scores, token ids, truncation, dry runs."""

import pytest

from tests.api.serve import client_of, events, run
from tests.api.test_completions import post
from tests.fake_engine import EOS, FakeEngine, says

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def by_choice(*texts: str):
    """Answer each choice with a text of its own."""
    return lambda request, sampling: [*texts[sampling.choice].encode(), EOS]


def test_best_of_gives_out_the_most_likely_choices_and_counts_all():
    async def scenario():
        engine = FakeEngine(by_choice("a", "bb", "ccc"))
        body = {"prompt": ["x", "y"], "best_of": 3, "n": 2}
        answer = (await post(engine, body)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert len(engine.requests[0].sampling) == 3
        assert answer["usage"]["completion_tokens"] == 2 * (2 + 3 + 4)
        assert answer["choices"][0]["logprobs"] is None

    run(scenario())


def test_best_of_ranks_by_the_mean_logprob(monkeypatch):
    async def scenario():
        monkeypatch.setattr("tests.fake_engine._entry", lambda token_id: entry(token_id))
        engine = FakeEngine(by_choice("z", "a", "m"))
        answer = (await post(engine, {"prompt": "x", "best_of": 3, "n": 2})).json()
        assert [choice["text"] for choice in answer["choices"]] == ["a", "m"]

    from model.step import TokenLogprobs

    def entry(token_id: int) -> TokenLogprobs:  # early letters are more likely
        return TokenLogprobs(token_id=token_id, logprob=-float(token_id), rank=1)

    run(scenario())


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_prompt_logprobs_have_an_entry_for_each_token_of_the_prompt(url):
    async def scenario():
        engine = FakeEngine(says("x"))
        body = {"prompt": "abc"} if url == COMPLETIONS else HELLO
        answer = (await post(engine, {**body, "prompt_logprobs": 2}, url)).json()
        holder = answer["choices"][0] if url == COMPLETIONS else answer
        scored = holder["prompt_logprobs"]
        ids = engine.requests[0].prompt_token_ids
        assert scored[0] is None
        assert len(scored) == len(ids)
        for token_id, candidates in zip(ids[1:], scored[1:], strict=True):
            assert candidates[str(token_id)]["logprob"] == -0.5
            assert candidates[str(token_id)]["rank"] == 1
        assert not engine.requests[0].read_prefix_cache  # what is cached has no logits

    run(scenario())


def test_prompt_can_be_scored_without_generating():
    async def scenario():
        engine = FakeEngine(says(""))
        body = {"prompt": "abc", "max_tokens": 0, "prompt_logprobs": 0}
        assert (await post(engine, body)).status_code == 200

    run(scenario())


def test_token_ids_are_returned_whole_and_streamed():
    async def scenario():
        body = {"prompt": "ab", "return_token_ids": True}
        whole = (await post(FakeEngine(says("xy")), body)).json()["choices"][0]
        assert whole["token_ids"] == [*b"xy", EOS]
        assert whole["prompt_token_ids"] == [256, *b"ab"]
        chunks = events((await post(FakeEngine(says("xy")), {**body, "stream": True})).text)
        choices = [chunk["choices"][0] for chunk in chunks]
        streamed = [token_id for choice in choices for token_id in choice["token_ids"]]
        assert streamed == whole["token_ids"]
        assert [c.get("prompt_token_ids") for c in choices][:2] == [[256, *b"ab"], None]
        chat = (
            await post(FakeEngine(says("xy")), {**HELLO, "return_token_ids": True}, CHAT)
        ).json()
        assert chat["choices"][0]["token_ids"] == [*b"xy", EOS]
        assert chat["prompt_token_ids"][0] == 258

    run(scenario())


def test_tokens_can_be_named_by_their_ids():
    async def scenario():
        fields = {"return_tokens_as_token_ids": True}
        body = {"prompt": "a", "logprobs": 1, **fields}
        logprobs = (await post(FakeEngine(says("x")), body)).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"][0] == "token_id:120"
        assert set(logprobs["top_logprobs"][0]) == {"token_id:120"}
        chat = {**HELLO, "logprobs": True, "top_logprobs": 2, **fields}
        entry = (await post(FakeEngine(says("x")), chat, CHAT)).json()
        entry = entry["choices"][0]["logprobs"]["content"][0]
        assert (entry["token"], entry["bytes"]) == ("token_id:120", [120])
        assert entry["top_logprobs"][1]["token"] == "token_id:65"

    run(scenario())


@pytest.mark.parametrize(
    ("limit", "kept"), [(3, b"xyz"), (100, b"uvwxyz"), (-1, b"uvwxyz"), (None, b"uvwxyz")]
)
def test_truncated_prompt_keeps_its_end(limit, kept):
    async def scenario():
        engine = FakeEngine(says("!"))
        body = {"prompt": "uvwxyz", "truncate_prompt_tokens": limit, "echo": True}
        answer = (await post(engine, body)).json()
        ids = engine.requests[0].prompt_token_ids
        assert bytes(i for i in ids if i < 256) == kept
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["choices"][0]["text"] == kept.decode() + "!"

    run(scenario())


def test_minus_one_truncates_to_what_the_context_holds():
    async def scenario():
        engine = FakeEngine(says("!"), max_model_len=16)
        body = {"prompt": "a" * 50, "truncate_prompt_tokens": -1, "max_tokens": 1}
        assert (await post(engine, body)).status_code == 200
        assert len(engine.requests[0].prompt_token_ids) == 15

    run(scenario())


def test_prefix_cache_can_be_left_unread():
    async def scenario():
        for wanted in (None, True, False):
            engine = FakeEngine(says("!"))
            await post(engine, {"prompt": "a", "cache_prompt": wanted})
            assert engine.requests[0].read_prefix_cache == (wanted is not False)

    run(scenario())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
def test_faulty_field_is_named(body, param):
    async def scenario():
        engine = FakeEngine(says("x"))
        response = await post(engine, body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert engine.requests == []

    run(scenario())


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_dry_run_says_what_would_be_and_runs_nothing(url):
    async def scenario():
        engine = FakeEngine(says("x"))
        body = {"prompt": ["a" * 40, "b"], "n": 2} if url == COMPLETIONS else {**HELLO, "n": 2}
        async with client_of(engine) as client:
            answer = await client.post(f"{url}?dry_run=1", json={**body, "max_tokens": 10})
            plan = answer.json()
            refused = await client.post(f"{url}?dry_run=maybe", json=body)
        assert engine.requests == []
        assert refused.json()["error"]["param"] == "dry_run"
        assert plan["object"] == "dry_run"
        first = plan["prompts"][0]
        assert first["prompt_tokens"] == len(first["prompt_token_ids"])
        assert (first["choices"], first["max_tokens"]) == (2, 10)
        assert first["expected_cached_tokens"] == first["prompt_tokens"] // 16 * 16
        assert first["kv_blocks"] == 2 * -(-(first["prompt_tokens"] + 10) // 16)

    run(scenario())


def test_parts_of_a_field_that_have_no_effect_are_named():
    async def scenario():
        options = {"include_usage": True, "include_obfuscation": False, "x\ny": 1}
        body = {"prompt": "a", "stream": True, "stream_options": options}
        response = await post(FakeEngine(says("x")), body)
        named = response.headers["x-ignored-fields"]
        assert named == "stream_options.include_obfuscation, stream_options.x_y"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_without_alternatives_have_no_field_for_them(stream):
    async def scenario():
        response = await post(
            FakeEngine(says("x")), {"prompt": "a", "logprobs": 0, "stream": stream}
        )
        answers = events(response.text) if stream else [response.json()]
        logprobs = answers[0]["choices"][0]["logprobs"]
        assert set(logprobs) == {"tokens", "token_logprobs", "text_offset"}

    run(scenario())
