"""Bad input, keys, ids and paths: a clear 4xx in OpenAI's shape, at no cost to anybody."""

import json

import pytest

from app.api.routes.static import PAGE_FILES
from tests.api.serve import client_of, routes_of, run
from tests.fake_engine import FakeEngine, says

URL = "/v1/completions"
JSON = {"content-type": "application/json"}


async def raw(content: bytes, *, headers=JSON, url=URL, **options):
    engine = FakeEngine(says("x"))
    async with client_of(engine, **options) as client:
        response = await client.post(url, content=content, headers=headers)
    return response, engine


def check_error(response, status: int, param: str | None = None) -> None:
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] == "false"
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"prompt": "a"}',
        b"[" * 100_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_refused(content):
    async def scenario():
        response, engine = await raw(content)
        assert response.status_code == 400
        check_error(response, 400, response.json()["error"]["param"])
        assert engine.requests == []

    run(scenario())


BAD_VALUES = {
    "temperature": [-0.1, 2.1, "0.5", True, "1e999", [], {}],
    "top_p": [-0.1, 1.1, "a", True],
    "top_k": [-5, 1.5, 2**40, "1"],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, 2.1],
    "max_tokens": [-1, 0, 2**31, 2**63, 5.0, "5", True],
    "n": [0, -1, 129, 10**30, 1.0, True],
    "logprobs": [21, -1, 10**9, True],
    "seed": [2**70, 1.5, "1"],
    "stop": [["a"] * 5, [""], "", ["x" * 2000], 5, [5]],
    "stop_token_ids": [[-1], [2**63], ["a"], [True], 5],
    "allowed_token_ids": [[], [260], [-1]],
    "logit_bias": [{"1": 101}, {"1": -101}, {"a": 1}, {"-1": 1}, {"260": 1}, [], {"1": "x"}],
    "bad_words": [[""], [5], ["a"] * 129],
    "min_tokens": [-1, 17],
    "prompt": [
        "",
        [],
        [[]],
        None,
        5,
        {},
        [True],
        [1.0],
        [-1],
        [260],
        [2**63],
        ["a", 1],
        [[1], "a"],
    ],
    "stream_options": [5, {"include_usage": 1}],
    "suffix": ["x"],
    "best_of": [0, 21],
    "response_format": [{"type": "json_schema"}, {"type": "yaml"}, "json_object", []],
    "structured_outputs": [{}, {"regex": "("}, {"choice": []}, {"json": "{"}, {"regex": ""}],
    "guided_choice": [[], [""], ["a"] * 3000, "a"],
    "cache_salt": ["", "x" * 300],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_VALUES.items() for value in values]
)
def test_value_out_of_range_is_refused_and_its_field_named(field, value):
    async def scenario():
        body = {"prompt": "a", field: value}
        response, engine = await raw(json.dumps(body).encode())
        error = response.json()["error"]
        check_error(response, 400, error["param"])
        assert (error["param"] or "").split(".")[0] == field
        assert engine.requests == []

    run(scenario())


@pytest.mark.parametrize("size", [20_000, 80_000])
def test_validation_bomb_costs_one_short_error(size):
    async def scenario():
        body = json.dumps({"prompt": [[1]] * size + ["x"]}).encode()
        response, _ = await raw(body)
        check_error(response, 400, "prompt")

    run(scenario())


def test_body_over_the_cap_is_refused():
    async def scenario():
        response, _ = await raw(b'{"prompt": "' + b"a" * 2000 + b'"}', max_request_bytes=1000)
        check_error(response, 413)

    run(scenario())


def test_other_content_types_are_refused():
    async def scenario():
        response, _ = await raw(b"prompt=a", headers={"content-type": "text/plain"})
        check_error(response, 415)

    run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a" * 300},
        {"prompt": "a", "max_tokens": 255},
        {"prompt": "a" * 1_000_000},
        {"prompt": [1] * 256, "max_tokens": 1},
    ],
)
def test_what_does_not_fit_the_context_is_told_with_its_code(body):
    async def scenario():
        response, engine = await raw(json.dumps(body).encode())
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert response.status_code == 400
        assert engine.requests == []

    run(scenario())


def test_unknown_model_is_a_404_that_echoes_little():
    async def scenario():
        body = {"prompt": "a", "model": "../" + "x" * 4000}
        response, _ = await raw(json.dumps(body).encode())
        check_error(response, 404, "model")
        assert response.json()["error"]["code"] == "model_not_found"

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/completions/", 404),
        ("POST", "/V1/completions", 404),
        ("POST", "//v1/completions", 404),
        ("TRACE", "/v1/completions", 405),
        ("GET", "/v1/models/nobody", 404),
    ],
)
def test_wrong_paths_and_methods_have_the_same_shape(method, path, status):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            response = await client.request(method, f"http://test{path}")
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    run(scenario())


PROBES = {"/health", "/health/live", "/health/ready"}
OPEN = {*PROBES, *PAGE_FILES}


def test_every_route_but_the_probes_needs_the_key():
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=("k1", "clé")) as client:
            paths = [route.path for route in routes_of(client._transport.app)]
            assert {"/v1/completions", "/metrics", "/docs", "/openapi.json"} <= set(paths)
            paths += ["/static/nothing", "/static/../v1/models", "/x"]
            for path in paths:
                for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                    response = await client.request(method, path)
                    assert (response.status_code == 401) == (path not in OPEN), (method, path)

    run(scenario())


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "Basic k1", "k1", "Bearer k1x", "Bearer " + "x" * 9000],
)
def test_missing_or_wrong_key_is_a_401(header):
    async def scenario():
        headers = {} if header is None else {"authorization": header}
        async with client_of(FakeEngine(says("x")), api_keys=("k1",)) as client:
            response = await client.get("/v1/models", headers=headers)
        check_error(response, 401)

    run(scenario())


@pytest.mark.parametrize("header", [b"Bearer k1", b"bearer k1", "Bearer clé".encode()])
def test_any_of_several_keys_lets_in(header):
    async def scenario():
        async with client_of(FakeEngine(says("x")), api_keys=("k1", "clé")) as client:
            response = await client.get("/v1/models", headers={b"authorization": header})
        assert response.status_code == 200

    run(scenario())


def test_request_id_is_kept_if_sane_and_replaced_if_not():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            kept = await client.get("/v1/models", headers={"x-request-id": "abc-1"})
            made = await client.get("/v1/models", headers={"x-request-id": "a b\tc"})
        assert kept.headers["x-request-id"] == "abc-1"
        assert made.headers["x-request-id"] not in ("", "a b\tc")

    run(scenario())


def test_draining_server_is_not_ready_and_refuses_with_a_hint():
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            assert (await client.get("/health/ready")).status_code == 200
            engine.is_draining = True
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            refused = await client.post(URL, json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["retry-after-ms"] == "1000"
        assert refused.headers["x-should-retry"] == "true"

    run(scenario())


@pytest.mark.parametrize(("is_alive", "age_s"), [(False, 0.0), (True, 1000.0)])
def test_dead_or_stuck_engine_is_never_healthy(is_alive, age_s):
    async def scenario():
        engine = FakeEngine(says("x"))
        async with client_of(engine) as client:
            engine.is_alive, engine.age_s = is_alive, age_s
            for path in sorted(PROBES):
                assert (await client.get(path)).status_code == 503

    run(scenario())


def test_models_tokenize_version_and_metrics_answer():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            models = (await client.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["fake", "other-name"]
            assert (await client.get("/v1/models/other-name")).json()["id"] == "other-name"
            tokens = (await client.post("/tokenize", json={"prompt": "ab</s>"})).json()
            assert tokens == {"count": 4, "max_model_len": 256, "tokens": [256, 97, 98, 257]}
            chat = {"messages": [{"role": "user", "content": "a"}], "return_token_strs": True}
            assert (await client.post("/tokenize", json=chat)).json()["token_strs"][
                0
            ] == "<|start|>"
            text = (await client.post("/detokenize", json={"tokens": [97, 98]})).json()
            assert text == {"prompt": "ab"}
            assert "version" in (await client.get("/version")).json()
            await client.post(URL, json={"prompt": "a"})
            page = (await client.get("/metrics")).text
            assert 'vllm:kv_cache_usage_perc{model_name="fake"} 0.25' in page
            assert 'vllm:generation_tokens_total{model_name="fake"} 2.0' in page
            schema = (await client.get("/openapi.json")).json()
            assert "/v1/chat/completions" in schema["paths"]

    run(scenario())
