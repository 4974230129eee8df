"""The OpenAPI document: every operation, field, range, answer and error, from one table.

Written from the wire types, not from the routes: bodies are read by hand there, and what FastAPI
would guess of them is not so. A test holds the table against the routes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.errors import (
    DeadlineExceeded,
    EngineFailed,
    IdempotencyConflict,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    ResumeExpired,
    ServiceError,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
)
from app.protocol.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    DryRun,
    EngineView,
    ErrorAnswer,
    Health,
    ModelCard,
    ModelList,
    RequestView,
    Tokenized,
    Version,
)
from app.protocol.chat import ChatRequest
from app.protocol.completions import CompletionRequest
from app.protocol.tokenize import DetokenizeRequest, TokenizeRequest

Json = dict[str, object]
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. `events` are the JSON of a stream's data lines."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answers: tuple[type[BaseModel], ...] = ()
    events: type[BaseModel] | None = None
    has_dry_run: bool = False
    is_open: bool = False  # without a key


OPERATIONS = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Continue a conversation",
        body=ChatRequest,
        answers=(ChatCompletion, DryRun),
        events=ChatCompletionChunk,
        has_dry_run=True,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        summary="Continue texts",
        body=CompletionRequest,
        answers=(Completion, DryRun),
        events=Completion,
        has_dry_run=True,
    ),
    Operation(
        method="get",
        path="/v1/models",
        summary="List the names that are served",
        answers=(ModelList,),
    ),
    Operation(
        method="get", path="/v1/models/{name}", summary="Describe a model", answers=(ModelCard,)
    ),
    Operation(
        method="post",
        path="/tokenize",
        summary="Turn a text or a conversation into ids",
        body=TokenizeRequest,
        answers=(Tokenized,),
    ),
    Operation(
        method="post",
        path="/detokenize",
        summary="Turn ids into text",
        body=DetokenizeRequest,
        answers=(Detokenized,),
    ),
    Operation(method="get", path="/v1/engine", summary="Look at the engine", answers=(EngineView,)),
    Operation(
        method="get",
        path="/v1/requests/{request_id}",
        summary="Look back at a request of one's own, by its x-request-id or the answer's id",
        answers=(RequestView,),
    ),
    Operation(method="get", path="/metrics", summary="Metrics in Prometheus' text format"),
    Operation(method="get", path="/version", summary="The server's version", answers=(Version,)),
    *(
        Operation(method="get", path=path, summary=summary, answers=(Health,), is_open=True)
        for path, summary in (
            ("/health", "Whether the server works and takes requests"),
            ("/health/live", "Whether the engine shows signs of life"),
            ("/health/ready", "Whether the server takes requests"),
        )
    ),
)
_ERRORS: tuple[type[ServiceError], ...] = (
    InvalidRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    IdempotencyConflict,
    ResumeExpired,
    PayloadTooLarge,
    UnsupportedMediaType,
    RateLimited,
    EngineFailed,
    Unavailable,
    DeadlineExceeded,
)


def openapi_document(version: str) -> Json:
    """Return the document."""
    bodies = {operation.body for operation in OPERATIONS if operation.body}
    answers = {answer for operation in OPERATIONS for answer in operation.answers}
    answers |= {operation.events for operation in OPERATIONS if operation.events} | {ErrorAnswer}
    named = sorted(bodies | answers, key=lambda model: model.__name__)
    _, definitions = models_json_schema(
        [(model, "validation") for model in named], ref_template=_REF
    )
    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "arriero", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _operation(operation: Operation) -> Json:
    described: Json = {"summary": operation.summary, "responses": _responses(operation)}
    parameters: list[Json] = []
    parameters += [
        _parameter(name, "path", {"type": "string"})
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    if operation.has_dry_run:
        parameters.append(_parameter("x-request-timeout", "header", {"type": "number"}))
        printable = {"type": "string", "maxLength": 255, "pattern": "^[ -~]+$"}
        parameters.append(_parameter("idempotency-key", "header", printable))
        parameters.append(_parameter("last-event-id", "header", {"type": "string"}))
        values = {"enum": ["0", "1", "false", "true"], "default": "0"}
        parameters.append(_parameter("dry_run", "query", values))
    if parameters:
        described["parameters"] = parameters
    if operation.is_open:
        described["security"] = []
    if operation.body is not None:
        content = {"application/json": {"schema": _ref(operation.body)}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _responses(operation: Operation) -> Json:
    content: Json = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answers:
        schemas = [_ref(answer) for answer in operation.answers]
        content = {
            "application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
        }
    if operation.events is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "string",
                "description": f"Lines of data, each the JSON of {operation.events.__name__} or "
                "of ErrorAnswer, and [DONE] at the end.",
            }
        }
    responses: Json = {"200": {"description": "The answer.", "content": content}}
    if operation.is_open:
        return responses | {"503": {"description": "It is not so.", "content": content}}
    failure = {"application/json": {"schema": _ref(ErrorAnswer)}}
    for error in _ERRORS:
        line = (error.__doc__ or "").partition("\n")[0]
        responses[str(error.status)] = {"description": line, "content": failure}
    return responses


def _parameter(name: str, place: str, schema: Mapping[str, object]) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": dict(schema)}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}
