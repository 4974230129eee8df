"""Answers and errors against OpenAI's published document and its SDK's types; the page on both."""

import asyncio

import pytest

from app.api.openapi import openapi_document
from app.errors import ServiceError
from app.protocol.common import HARMLESS as KNOWN_HARMLESS
from tests.api.serve import client_of, run
from tests.conformance.answers import (
    CHAT,
    COMPLETIONS,
    HELLO,
    SAY,
    SCHEMAS,
    SdkErrorBody,
    SdkModelList,
    engine,
    sdk_deviations,
    see,
)
from tests.conformance.document import ABSENT, OPENAI, Document, Sample
from tests.conformance.errors import MISHAPS, meet, meet_in_stream
from tests.conformance.fields import HARMLESS, TEMPLATE_SEES, WORKS
from tests.conformance.report import (
    BOUNDS,
    EXTENSIONS,
    KNOWN,
    NOTES,
    REPORT,
    REQUESTS,
    ask,
    report,
)


@pytest.fixture(scope="module")
def document() -> Document:
    """OpenAI's document, or skip."""
    if not OPENAI.is_file():
        pytest.skip("OpenAI's OpenAPI document is not on this machine")
    return Document.read()


@pytest.fixture(scope="module")
def seen(document):
    return asyncio.run(see(document))


@pytest.fixture(scope="module")
def asked(document):
    return asyncio.run(ask(document))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_answers_deviate_from_the_document_only_where_it_is_known(seen, kind):
    found = {(kind, d.path, d.found) for d in seen[kind].by_document}
    assert seen[kind].count
    assert found == {known for known in KNOWN if known[0] == kind}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_sdks_types_read_strictly_say_no_more_than_the_document(seen, kind):
    found = {(kind, d.path, d.found) for d in seen[kind].by_sdk}
    assert found <= set(KNOWN)


def test_extra_fields_of_answers_are_the_known_ones(seen, document):
    extras = {kind: set(found.extras(document, kind)) for kind, found in seen.items()}
    told = {"choices.*.stop_reason", "choices.*.token_ids"}
    thoughts = {"reasoning", "reasoning_content"}
    assert extras == {
        "completion": told | {"choices.*.prompt_token_ids", "choices.*.prompt_logprobs"},
        "completion, streamed": told | {"choices.*.prompt_token_ids"},
        "chat": told
        | {f"choices.*.message.{name}" for name in thoughts}
        | {"prompt_token_ids", "prompt_logprobs"},
        "chat, streamed": told
        | {f"choices.*.delta.{name}" for name in thoughts}
        | {"prompt_token_ids"},
        "model": {"root", "max_model_len", "precision"},
    }


@pytest.mark.parametrize("kind", SCHEMAS)
def test_sdk_knows_all_fields_that_the_document_has(seen, document, kind):
    assert seen[kind].unknown_to_sdk == set(seen[kind].extras(document, kind))


def test_list_of_models_is_as_both_say(document):
    async def scenario():
        async with client_of(engine()) as client:
            models = (await client.get("/v1/models")).json()
        assert document.deviations(models, "ListModelsResponse") == set()
        assert sdk_deviations(models, SdkModelList) == set()

    run(scenario())


@pytest.mark.parametrize("name", MISHAPS)
def test_error_is_as_both_say(document, name):
    async def scenario():
        expected, mishap = MISHAPS[name]
        status, body = await meet(mishap)
        assert status == expected
        assert document.deviations(body, "ErrorResponse") == set()
        assert sdk_deviations(body, SdkErrorBody) == set()

    run(scenario())


def test_every_status_of_an_error_is_met_but_those_of_socket_retries_and_deadlines():
    def kinds(kind):
        return {kind}.union(*map(kinds, kind.__subclasses__()))

    elsewhere = {408, 431, 409, 410, 504}
    statuses = {kind.status for kind in kinds(ServiceError)}
    assert {status for status, _ in MISHAPS.values()} == statuses - elsewhere


@pytest.mark.parametrize(("url", "body"), [(COMPLETIONS, SAY), (CHAT, HELLO)])
def test_error_in_a_stream_is_as_both_say(document, url, body):
    async def scenario():
        event = await meet_in_stream(url, body)
        assert event["error"]["message"] == "the step failed"
        assert document.deviations(event, "ErrorResponse") == set()
        assert sdk_deviations(event, SdkErrorBody) == set()

    run(scenario())


@pytest.mark.parametrize("url", REQUESTS)
def test_every_field_is_done_refused_or_named(document, asked, url):
    """What is taken and changes nothing is known to have nothing to change."""
    rows = asked.rows[url]
    fields = {row.path.partition(".")[0].partition("[")[0] for row in rows}
    assert fields == set(document.properties(REQUESTS[url][0]))
    silent = {row.path for row in rows if row.verdict == HARMLESS}
    assert {path for path in silent if not path.endswith(".prompt_cache_breakpoint")} <= {
        *KNOWN_HARMLESS,
        "response_format[text]",
        "response_format[json_schema].json_schema.description",
        "response_format[json_schema].json_schema.strict",
        "tools[function].function.strict",
    }


def test_every_field_of_ours_works_and_is_explained(asked):
    rows = [row for url in REQUESTS for row in asked.extensions[url]]
    assert {row.verdict for row in rows} == {WORKS, TEMPLATE_SEES}
    assert {row.path for row in rows} == set(EXTENSIONS)


def test_page_is_up_to_date(document, asked, seen):
    page = asyncio.run(report(document, asked, seen))
    assert REPORT.read_text("utf-8") == page, "run scripts/conformance"
    for path in (*NOTES, *BOUNDS):
        assert f"| `{path}` |" in page, path


def test_events_before_the_last_have_no_usage_rather_than_null(seen):
    """As the page says in words, which nothing else holds against the answers."""
    assert seen["chat, streamed"].paths["usage"]
    assert "usage" not in seen["chat, streamed"].nulls | seen["completion, streamed"].nulls


def test_samples_reach_each_branch_and_part():
    schema = {
        "type": "object",
        "required": ["kind"],
        "properties": {
            "kind": {"enum": ["x"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 9},
        },
    }
    own = Document(openapi_document("1"))
    found = list(own.samples("f", {"anyOf": [schema, {"type": "null"}]}, {}))
    plain = {"kind": "x"}
    assert found == [
        Sample(path="f", leaf=plain, value=plain, against=ABSENT),
        *(
            Sample(path="f.size", leaf=size, value={**plain, "size": size}, against=plain)
            for size in (1, 0, 9)
        ),
        Sample(path="f", leaf=None, value=None, against=ABSENT),
    ]


def test_null_that_a_schema_does_not_allow_is_found():
    own = Document(openapi_document("1"))
    error = {"error": {"message": None, "type": "x", "param": None, "code": None}}
    (deviation,) = own.deviations(error, "ErrorAnswer")
    assert (deviation.path, deviation.found) == ("error.message", "null")
