"""The OpenAPI document against the routes, and real answers against the document."""

import jsonschema
import pytest
from pydantic import ValidationError

from app.api.openapi import OPERATIONS, openapi_document
from app.api.routes.static import PAGE_FILES
from app.factory import create_app
from app.protocol.chat import ChatMessage, ChatRequest
from app.protocol.completions import CompletionRequest
from app.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from app.settings import ServerSettings
from tests.api.serve import client_of, events, routes_of, run
from tests.api.test_tools import TWO_CALLS, WEATHER
from tests.fake_engine import FakeEngine, make_context, says

DOCUMENT = openapi_document("1")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
DOCS = {"/docs", "/openapi.json"}


def test_every_route_is_in_the_document_and_nothing_else():
    app = create_app(make_context(FakeEngine(says("x"))), ServerSettings())
    routed = {
        (method.lower(), route.path.replace(":path", ""))
        for route in routes_of(app)
        if route.path not in DOCS | set(PAGE_FILES)
        for method in route.methods - {"HEAD"}
    }
    assert routed == {(operation.method, operation.path) for operation in OPERATIONS}


def refs(node) -> set[str]:
    if isinstance(node, dict):
        found = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return found.union(*(refs(value) for value in node.values()))
    return set().union(*(refs(item) for item in node)) if isinstance(node, list) else set()


def test_schemas_are_valid_and_all_references_lead_somewhere():
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {ref.removeprefix("#/components/schemas/") for ref in refs(DOCUMENT)} <= set(schemas)


def test_served_document_is_this_one():
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            served = (await client.get("/openapi.json")).json()
        assert served["paths"] == DOCUMENT["paths"]
        assert served["components"] == DOCUMENT["components"]

    run(scenario())


def check(value: object, name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)


EXTRAS = {"return_token_ids": True, "n": 2}
CASES = [
    (COMPLETIONS, {"prompt": "a"}, "Completion"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 2, "echo": True, **EXTRAS}, "Completion"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 2, "stop": ["l"]}, "Completion"),
    (CHAT, HELLO, "ChatCompletion"),
    (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2, **EXTRAS}, "ChatCompletion"),
    (CHAT, {**HELLO, "prompt_logprobs": 1}, "ChatCompletion"),
    (CHAT, {**HELLO, "tools": [WEATHER]}, "ChatCompletion"),
    ("/tokenize", {"prompt": "a", "return_token_strs": True}, "Tokenized"),
    ("/detokenize", {"tokens": [65]}, "Detokenized"),
    (COMPLETIONS + "?dry_run=1", {"prompt": "a"}, "DryRun"),
    (CHAT + "?dry_run=1", HELLO, "DryRun"),
]


@pytest.mark.parametrize(("url", "body", "name"), CASES)
@pytest.mark.parametrize("text", ["Hello", TWO_CALLS])
def test_whole_answer_is_as_described(url, body, name, text):
    async def scenario():
        async with client_of(FakeEngine(says(text), max_model_len=4096)) as client:
            response = await client.post(url, json=body)
        assert response.status_code == 200, response.text
        check(response.json(), name)

    run(scenario())


@pytest.mark.parametrize(
    ("url", "body", "name"),
    [case for case in CASES if "completions" in case[0] and "prompt_logprobs" not in case[1]],
)
@pytest.mark.parametrize("text", ["Hello", TWO_CALLS])
def test_every_event_is_as_described(url, body, name, text):
    if "dry_run" in url:
        pytest.skip("not streamed")

    async def scenario():
        usage = {"include_usage": True, "continuous_usage_stats": True}
        fields = {**body, "stream": True, "stream_options": usage}
        async with client_of(FakeEngine(says(text), max_model_len=4096)) as client:
            chunks = events((await client.post(url, json=fields)).text)
        assert chunks
        for chunk in chunks:
            check(chunk, "ChatCompletionChunk" if url == CHAT else name)

    run(scenario())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models", "ModelList"),
        ("/v1/models/fake", "ModelCard"),
        ("/v1/models/other", "ErrorAnswer"),
        ("/v1/engine", "EngineView"),
        ("/version", "Version"),
        ("/health", "Health"),
        ("/health/live", "Health"),
        ("/health/ready", "Health"),
        ("/nowhere", "ErrorAnswer"),
        (COMPLETIONS, "ErrorAnswer"),
    ],
)
def test_answer_to_a_get_is_as_described(path, name):
    async def scenario():
        async with client_of(FakeEngine(says("x"))) as client:
            check((await client.get(path)).json(), name)

    run(scenario())


@pytest.mark.parametrize("operation", [o for o in OPERATIONS if o.body])
def test_every_field_of_a_body_has_a_type(operation):
    schema = DOCUMENT["components"]["schemas"][operation.body.__name__]
    assert set(schema["properties"]) == {
        field.alias or name for name, field in operation.body.model_fields.items()
    }
    for name, field in schema["properties"].items():
        assert field.keys() & {"type", "anyOf", "$ref", "enum", "allOf"}, name


@pytest.mark.parametrize(
    ("model", "needed"),
    [
        (ChatRequest, {"messages": [{"role": "user"}]}),
        (ChatMessage, {"role": "user"}),
        (CompletionRequest, {"prompt": "a"}),
        (TokenizeRequest, {"prompt": "a"}),
        (DetokenizeRequest, {"tokens": [1]}),
    ],
)
def test_null_is_documented_where_it_is_taken_and_nowhere_else(model, needed):
    for name, field in model.model_fields.items():
        spelt = field.alias or name
        body = {**needed, spelt: None}
        try:
            model.model_validate(body)
        except ValidationError:
            with pytest.raises(jsonschema.ValidationError):
                check(body, model.__name__)
        else:
            check(body, model.__name__)
