"""Structured output over HTTP and a tiny real model: whatever it is made to say validates."""

import asyncio
import json
import random

import httpx
import jsonschema
import pytest

from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import events, real_server
from tests.e2e.test_openai_sdk import make_server_context
from tests.toy import write_toy_checkpoint

URL = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def context(folder):
    # Few blocks, so that sequences are preempted; guesses, so that they meet grammars.
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}
    return make_server_context(
        folder, "--kv-cache-dtype", "float16", "--kv-cache-memory-bytes", "58000",
        "--max-model-len", "224", "--max-num-seqs", "16",
        "--speculative-config", json.dumps(guesses),
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(context):
    with real_server(create_app(context, ServerSettings())) as url:
        yield url


def random_schema(rng: random.Random, depth: int = 3) -> dict:
    """A schema of what pydantic and people write; satisfiable, with short values."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth:
        kinds += ["object"] * 5 + ["array"] * 3 + ["any_of", "optional", "one_of"]
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 6)}
        case "integer":
            low = rng.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": rng.randint(1, 99)}
        case "enum":
            values = ["a", 'q"\\\n', 3, -0.5, None, True, [1], {"x": "é"}]
            return {"enum": rng.sample(values, rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["one", 7, False, {"k": [1, 2]}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{1,4}$", "^\\d{3}-x$", "^$"])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time"])}
        case "array":
            low = rng.randint(0, 2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
        case "any_of":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "one_of":
            return {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}
        case "optional":
            return {"anyOf": [random_schema(rng, depth - 1), {"type": "null"}]}
        case "object":
            names = rng.sample(["a", "b", "c c", "ü", 'quo"te', "d"], rng.randint(0, 4))
            properties = {name: random_schema(rng, depth - 1) for name in names}
            required = [name for name in names if rng.random() < 0.7]
            schema = {"type": "object", "properties": properties, "required": required}
            return schema | {"additionalProperties": False}
        case kind:
            return {"type": kind}


def body_of(schema: dict, rng: random.Random) -> dict:
    return {
        "prompt": rng.choice(["Hello", "JSON:", "x" * 60]),
        "max_tokens": 150,
        "temperature": rng.choice([0, 1, 1.5]),
        "seed": rng.randrange(1000),
        "structured_outputs": {"json": schema},
    }


def test_answers_validate_whatever_the_schema(url, context, full):
    rng = random.Random(11)
    count = 500 if full else 60
    cases = [(schema := random_schema(rng), body_of(schema, rng)) for _ in range(count)]

    async def scenario():
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            # Four that grow side by side need more blocks than there are, whoever else is quick.
            crowd = {"prompt": "x", "n": 4, "max_tokens": 150, "ignore_eos": True}
            bodies = [crowd, *(body for _, body in cases)]
            crowded, *responses = await asyncio.gather(
                *(client.post(URL, json=body) for body in bodies)
            )
            assert crowded.status_code == 200
            return responses

    num_whole = 0
    for (schema, _), response in zip(cases, asyncio.run(scenario()), strict=True):
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "length":
            continue
        num_whole += 1
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), schema)
    assert num_whole > 0.8 * count
    stats = context.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_accepted_tokens > 0
    assert stats.num_failed_steps == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_choices_with_logprobs_equal_whole_ones(url, temperature):
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "n": 3,
        "temperature": temperature,
        "seed": 5,
        "max_tokens": 150,
        "logprobs": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    }
    with httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    texts, numbers = [""] * 3, [0] * 3
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content") or ""
        numbers[choice["index"]] += len((choice["logprobs"] or {"content": []})["content"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    for text, number, choice in zip(texts, numbers, whole["choices"], strict=True):
        jsonschema.validate(json.loads(text), SCHEMA)
        entries = choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
        assert number == len(entries)


def test_answer_of_a_seed_is_the_same_in_any_company(url):
    body = body_of(SCHEMA, random.Random(3)) | {"temperature": 1}
    rng = random.Random(4)
    others = [body_of(random_schema(rng), rng) for _ in range(10)]

    async def scenario():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            alone = await client.post(URL, json=body)
            together = await asyncio.gather(*(client.post(URL, json=b) for b in [body, *others]))
            return alone.json()["choices"], together[0].json()["choices"]

    alone, together = asyncio.run(scenario())
    assert alone == together


def test_stop_string_and_length_still_cut(url):
    body = {"prompt": "x", "temperature": 0, "structured_outputs": {"choice": ["alpha-beta"]}}
    with httpx.Client(base_url=url, timeout=60) as client:
        cut = client.post(URL, json={**body, "stop": ["-"]}).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == ("alpha", "stop", "-")
        short = client.post(URL, json={**body, "max_tokens": 1}).json()["choices"][0]
        assert short["finish_reason"] == "length"
        assert "alpha-beta".startswith(short["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_json": {"type": "objekt"}}, "guided_json"),
        ({"json_schema": 5}, "json_schema"),
        ({"guided_choice": [1]}, "guided_choice"),
    ],
)
def test_faulty_demand_is_named(url, fields, param):
    with httpx.Client(base_url=url, timeout=60) as client:
        response = client.post(URL, json={"prompt": "x", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
