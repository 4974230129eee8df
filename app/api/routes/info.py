"""Models, tokenizing, health, metrics, version: what is asked about the server."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from app.api.body import ignored_header, read_body
from app.engine.client import EngineClient
from app.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from app.serving.context import ServingContext
from app.serving.engine_view import engine_view
from app.serving.models import get_model, list_models
from app.serving.request_log import request_view
from app.serving.tokenize import detokenize, tokenize


def info_routes(context: ServingContext, max_bytes: int) -> APIRouter:
    """Return the routes that tell about the model."""
    router = APIRouter(redirect_slashes=False)

    @router.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(list_models(context))

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(get_model(context, name))

    @router.post("/tokenize")
    async def tokenize_route(request: Request) -> JSONResponse:
        body = await read_body(request, TokenizeRequest, max_bytes)
        headers = ignored_header(body)
        return JSONResponse(await tokenize(context, body), headers=headers)

    @router.post("/detokenize")
    async def detokenize_route(request: Request) -> JSONResponse:
        body = await read_body(request, DetokenizeRequest, max_bytes)
        headers = ignored_header(body)
        return JSONResponse(await detokenize(context, body), headers=headers)

    @router.get("/v1/engine")
    async def engine() -> JSONResponse:
        return JSONResponse(engine_view(context))

    @router.get("/v1/requests/{request_id}")
    async def one_request(request_id: str, request: Request) -> JSONResponse:
        tenant: str = request.state.key_name or ""
        return JSONResponse(request_view(context.requests.find(tenant, request_id)))

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def show_version() -> JSONResponse:
        return JSONResponse({"version": own_version()})

    return router


def health_routes(engine: EngineClient, is_draining: Callable[[], bool]) -> APIRouter:
    """Return the probes: alive hangs on the step loop's heartbeat, ready on taking requests."""
    router = APIRouter(redirect_slashes=False)

    def is_live() -> bool:
        return engine.is_alive and engine.stuck_for < 1

    def report(is_good: bool, good: str, bad: str) -> JSONResponse:
        return JSONResponse({"status": good if is_good else bad}, 200 if is_good else 503)

    @router.api_route("/health/live", methods=["GET", "HEAD"])
    async def live() -> JSONResponse:
        return report(is_live(), "alive", "stuck")

    @router.api_route("/health/ready", methods=["GET", "HEAD"])
    async def ready() -> JSONResponse:
        return report(is_live() and not is_draining(), "ready", "not ready")

    @router.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        return report(is_live() and not is_draining(), "ok", "not ok")

    return router


def own_version() -> str:
    try:
        return version("arriero")
    except PackageNotFoundError:
        return "unknown"
