"""Clients for tests of the HTTP service: in-process, or a real server on a free port."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import uvicorn
from starlette.routing import Route

from app.factory import create_app
from app.settings import ServerSettings
from tests.fake_engine import FakeEngine, make_context


@contextlib.asynccontextmanager
async def client_of(engine: FakeEngine, **options) -> AsyncIterator[httpx.AsyncClient]:
    """An in-process client of the whole application."""
    has_template = options.pop("has_template", True)
    think_tags = options.pop("think_tags", None)
    context = make_context(engine, has_template=has_template, think_tags=think_tags)
    transport = httpx.ASGITransport(app=create_app(context, ServerSettings(**options)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    context.grammars.close()


def routes_of(app) -> list[Route]:
    """All routes; newer versions of FastAPI keep those of included routers apart."""
    inner = [getattr(route, "original_router", None) for route in app.routes]
    nested = [route for router in inner if router is not None for route in router.routes]
    return [route for route in [*app.routes, *nested] if isinstance(route, Route)]


def events(text: str) -> list[dict]:
    """The JSON of a stream's events; it must end with [DONE]."""
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def real_server(app) -> Iterator[str]:
    """Serve an application on a free port of the loopback; yields its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        host, port = listener.getsockname()
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def run(coroutine) -> None:
    asyncio.run(coroutine)
