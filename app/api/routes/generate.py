"""POST /v1/completions and POST /v1/chat/completions."""

import hashlib
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api.body import ignored_header, read_body
from app.api.sse import respond
from app.errors import InvalidRequest
from app.protocol.chat import ChatRequest
from app.protocol.common import SamplingFields
from app.protocol.completions import CompletionRequest
from app.serving.answer import ResumableAnswer
from app.serving.chat import prepare_chat, start_chat
from app.serving.completions import prepare_completion, start_completion
from app.serving.context import ServingContext
from app.serving.dry_run import describe_prompts
from app.serving.generation import Caller, Prompt, reserve_tokens
from app.serving.quotas import NOTHING_RESERVED, Quota, Tenants
from app.serving.runs import RunRequest, RunStore
from app.serving.tracing import RequestSpan, RequestTracer, refusals_noted

MAX_TIMEOUT_S = 86_400
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_PRINTABLE = re.compile(r"[ -~]{1,255}")


class _Prepared(Protocol):
    """A request that is checked and tokenised."""

    @property
    def prompts(self) -> list[Prompt]: ...


Fields = TypeVar("Fields", bound=SamplingFields)
Prepared = TypeVar("Prepared", bound=_Prepared)
Prepare = Callable[[ServingContext, Fields], Awaitable[Prepared]]
Start = Callable[[ServingContext, Prepared, str, Caller], ResumableAnswer]


def generate_routes(
    context: ServingContext, tenants: Tenants, runs: RunStore, max_bytes: int
) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, CompletionRequest, prepare_completion, start_completion)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(request, ChatRequest, prepare_chat, start_chat)

    async def generate(
        request: Request,
        model: type[Fields],
        prepare: "Prepare[Fields, Prepared]",
        start: "Start[Prepared]",
    ) -> Response:
        is_dry_run = _is_dry_run(request)
        span = None if is_dry_run else _start_span(request, context.tracer)
        quota = _enter(request, tenants)
        key = _idempotency_key(request)
        # A flood is refused before its bodies are looked at; what is under way needs no place.
        if not is_dry_run and (key is None or (_tenant(request), key) not in runs):
            with refusals_noted(span):
                context.engine.check_room()
        body = await read_body(request, model, max_bytes)
        headers = ignored_header(body)
        caller = _caller(request, tenants, body, span, is_resumable=key is not None)
        if is_dry_run:
            prepared = await prepare(context, body)
            plan = await describe_prompts(context, prepared.prompts, caller.cache_salt)
            return JSONResponse(plan, headers=headers)
        reservation = NOTHING_RESERVED

        async def begin() -> ResumableAnswer:
            nonlocal reservation
            with refusals_noted(span):
                prepared = await prepare(context, body)
                reservation = reserve_tokens(quota, prepared.prompts)
                return start(context, prepared, _unique_id(request), caller)

        def settle(num_tokens: int) -> None:
            reservation.settle(num_tokens)

        is_stream = bool(body.stream)
        if key is None:
            answer: ResumableAnswer | None = None
            request.state.at_end.append(lambda: settle(answer.num_tokens() if answer else 0))
            answer = await begin()
            return await respond(request, answer, stream=is_stream, headers=headers)
        run = RunRequest(
            digest=_digest(request, body), is_stream=is_stream, begin=begin, settle=settle
        )
        last_event_id = _last_event_id(request, is_stream=is_stream)
        followed = await runs.follow((caller.tenant, key), run, last_event_id)
        if followed.is_replayed:
            headers["idempotent-replayed"] = "true"
        return await respond(request, followed, stream=is_stream, headers=headers)

    return router


def _idempotency_key(request: Request) -> str | None:
    """Return the key of a request that may be repeated. Raises InvalidRequest."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        if "last-event-id" in request.headers:
            raise InvalidRequest(
                "'Last-Event-ID' needs the 'Idempotency-Key' of the request.",
                param="last-event-id",
            )
        return None
    if len(keys) > 1 or not _PRINTABLE.fullmatch(keys[0]):
        raise InvalidRequest(
            "'Idempotency-Key' must be one text of 1 to 255 printable ASCII characters.",
            param="idempotency-key",
        )
    return keys[0]


def _last_event_id(request: Request, *, is_stream: bool) -> str | None:
    """Return the id behind which a stream is to go on. Raises InvalidRequest."""
    given = request.headers.get("last-event-id")
    if given is not None and not is_stream:
        raise InvalidRequest("'Last-Event-ID' needs 'stream'.", param="last-event-id")
    return given


def _digest(request: Request, body: SamplingFields) -> bytes:
    """Return what two requests have in common if they ask for the same, however it is spelt."""
    said = json.dumps(body.model_dump(mode="json", by_alias=True), sort_keys=True)
    path: str = request.scope["path"]
    return hashlib.sha256(f"{path}\0{said}".encode()).digest()


def _tenant(request: Request) -> str:
    """Return the name of the key that was sent; "" where none is asked for."""
    name: str | None = request.state.key_name
    return name or ""


def _enter(request: Request, tenants: Tenants) -> Quota:
    """Count a request against its key's quota until its answer has ended. Raises RateLimited."""
    quota = tenants.quota(_tenant(request))
    request.state.more_headers.append(quota.headers)
    quota.enter()
    request.state.at_end.append(quota.leave)
    return quota


def _start_span(request: Request, tracer: RequestTracer | None) -> RequestSpan | None:
    """Have a request traced, if there is a tracer; its answer tells the span."""
    if tracer is None:
        return None
    span = tracer.start(request.scope["headers"])
    request.state.more_headers.append(span.headers)
    request.state.at_end.append(lambda: span.close(getattr(request.state, "error_code", None)))
    return span


def _is_dry_run(request: Request) -> bool:
    """Say whether a request only asks what it would be. Raises InvalidRequest for other values."""
    value = request.query_params.get("dry_run", "0").lower()
    if value not in ("0", "1", "false", "true"):
        raise InvalidRequest("'dry_run' must be 0 or 1.", param="dry_run")
    return value in ("1", "true")


def _caller(
    request: Request,
    tenants: Tenants,
    fields: SamplingFields,
    span: RequestSpan | None,
    *,
    is_resumable: bool,
) -> Caller:
    """Return whose share of the engine a request takes, and how long. Raises InvalidRequest."""
    name = _tenant(request)
    given = request.headers.get("x-request-timeout")
    timeout_s = None
    if given is not None:
        if not _SECONDS.fullmatch(given) or not 0 < float(given) <= MAX_TIMEOUT_S:
            raise InvalidRequest(
                f"'x-request-timeout' must be a number of seconds up to {MAX_TIMEOUT_S}.",
                param="x-request-timeout",
            )
        timeout_s = float(given)
    salt = tenants.cache_salt(name, fields.cache_salt)
    request_id: str = request.state.request_id
    return Caller(
        tenant=name,
        request_id=request_id,
        cache_salt=salt,
        timeout_s=timeout_s,
        is_resumable=is_resumable,
        span=span,
    )


def _unique_id(request: Request) -> str:
    """Make the engine's id of a request: two clients may send the same X-Request-Id at once."""
    name: str = request.state.request_id
    return f"{name[:64]}-{uuid.uuid4().hex[:12]}"
