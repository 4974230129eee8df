"""An ASGI application of this process behind an httpx client.

httpx's own transport of this kind gives out an answer when it is whole; here it streams. Knows
nothing of what is asked.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class AppTransport(httpx.AsyncBaseTransport):
    """Hands each request to an application; closing the answer is the client's going away."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(await request.aread())
        scope = _scope_of(request)
        return await exchange.start(self._app(scope, exchange.receive, exchange.send))


class _Exchange(httpx.AsyncByteStream):
    """One request and its answer, which comes through a queue."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._is_gone = asyncio.Event()
        self._work: asyncio.Future[None] | None = None

    async def receive(self) -> Message:
        """Give the body once, and then nothing but the end."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def start(self, work: Awaitable[None]) -> httpx.Response:
        """Run the application until its answer begins."""
        self._work = asyncio.ensure_future(work)
        try:
            first = await self._next()
        except BaseException:
            await self.aclose()
            raise
        return httpx.Response(first["status"], headers=first["headers"], stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._next()
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def aclose(self) -> None:
        self._is_gone.set()
        if self._work is not None:
            await asyncio.wait({self._work})

    async def _next(self) -> Message:
        """Return the next message. Raises what the application raised instead of sending one."""
        assert self._work is not None
        coming = asyncio.ensure_future(self._messages.get())
        try:
            waits: set[asyncio.Future[Any]] = {coming, self._work}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done() and self._messages.empty():
                self._work.result()
                raise httpx.RemoteProtocolError("the application has ended without an answer")
            return await coming
        finally:
            coming.cancel()


def _scope_of(sent: httpx.Request) -> Message:
    """Return a request as ASGI has it."""
    headers = [(name.lower(), value) for name, value in sent.headers.raw]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": sent.url.scheme,
        "path": sent.url.path,
        "raw_path": sent.url.raw_path.split(b"?")[0],
        "query_string": sent.url.query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": (sent.url.host, sent.url.port),
    }
