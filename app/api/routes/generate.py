"""POST /v1/completions and POST /v1/chat/completions."""

import re
import uuid

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.api.body import ignored_header, read_body
from app.api.sse import respond
from app.errors import InvalidRequest
from app.protocol.chat import ChatRequest
from app.protocol.completions import CompletionRequest
from app.serving.chat import prepare_chat, start_chat
from app.serving.completions import prepare_completion, start_completion
from app.serving.context import ServingContext
from app.serving.dry_run import describe_prompts
from app.serving.generation import Caller

MAX_TIMEOUT_S = 86_400
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


def generate_routes(context: ServingContext, max_bytes: int) -> APIRouter:
    """Return the routes that generate text."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, max_bytes)
        headers = ignored_header(body)
        prepared = await prepare_completion(context, body)
        if _is_dry_run(request):
            plan = await describe_prompts(context, prepared.prompts, body.cache_salt)
            return JSONResponse(plan, headers=headers)
        answer = start_completion(context, prepared, _unique_id(request), _caller(request))
        return await respond(request, answer, stream=bool(body.stream), headers=headers)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatRequest, max_bytes)
        headers = ignored_header(body)
        prepared = await prepare_chat(context, body)
        if _is_dry_run(request):
            plan = await describe_prompts(context, [prepared.prompt], body.cache_salt)
            return JSONResponse(plan, headers=headers)
        answer = start_chat(context, prepared, _unique_id(request), _caller(request))
        return await respond(request, answer, stream=bool(body.stream), headers=headers)

    return router


def _is_dry_run(request: Request) -> bool:
    """Say whether a request only asks what it would be. Raises InvalidRequest for other values."""
    value = request.query_params.get("dry_run", "0").lower()
    if value not in ("0", "1", "false", "true"):
        raise InvalidRequest("'dry_run' must be 0 or 1.", param="dry_run")
    return value in ("1", "true")


def _caller(request: Request) -> Caller:
    """Return whose share of the engine a request takes, and how long. Raises InvalidRequest."""
    name: str | None = request.state.key_name
    given = request.headers.get("x-request-timeout")
    timeout_s = None
    if given is not None:
        if not _SECONDS.fullmatch(given) or not 0 < float(given) <= MAX_TIMEOUT_S:
            raise InvalidRequest(
                f"'x-request-timeout' must be a number of seconds up to {MAX_TIMEOUT_S}.",
                param="x-request-timeout",
            )
        timeout_s = float(given)
    request_id: str = request.state.request_id
    return Caller(tenant=name or "", request_id=request_id, timeout_s=timeout_s)


def _unique_id(request: Request) -> str:
    """Make the engine's id of a request: two clients may send the same X-Request-Id at once."""
    name: str = request.state.request_id
    return f"{name[:64]}-{uuid.uuid4().hex[:12]}"
