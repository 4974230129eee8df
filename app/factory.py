"""Puts the HTTP application together; loads nothing, starts nothing but the engine's thread."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from app.api.errors import on_http_exception, on_service_error
from app.api.middleware import Gate
from app.api.openapi import openapi_document
from app.api.routes.document import document_routes
from app.api.routes.generate import generate_routes
from app.api.routes.info import health_routes, info_routes, own_version
from app.api.routes.static import static_routes
from app.errors import ServiceError
from app.serving.context import ServingContext
from app.serving.quotas import QUOTA_HEADERS, Tenants
from app.serving.runs import RunStore
from app.settings import ServerSettings


def create_app(context: ServingContext, settings: ServerSettings) -> FastAPI:
    """Return the application over a context; its engine lives as long as the application."""
    engine = context.engine
    runs = RunStore(settings.resume_window_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        engine.start()
        yield
        await engine.shutdown()
        await runs.close()
        context.grammars.close()
        if context.tracer is not None:
            await context.tracer.close()

    app = FastAPI(
        title="arriero",
        version=own_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # ours is written by hand
    )
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    tenants = Tenants(settings.keys())
    app.include_router(generate_routes(context, tenants, runs, settings.max_request_bytes))
    app.include_router(document_routes(openapi_document(own_version())))
    app.include_router(info_routes(context, settings.max_request_bytes))
    app.include_router(health_routes(engine, lambda: engine.is_draining))
    app.include_router(static_routes())
    app.add_middleware(Gate, api_keys=settings.keys(), count_error=context.metrics.count_error)
    if settings.allowed_origins:
        # Outermost: a browser asks without the key whether it may ask with it.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                *("x-request-id", "x-ignored-fields", "retry-after", "retry-after-ms"),
                "idempotent-replayed",
                "traceparent",
                *QUOTA_HEADERS,
            ],
        )
    return app
