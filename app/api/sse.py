"""Answers on the wire: one JSON body, or server-sent events as they come.

Either way the client's going away ends the work: Starlette would not tell a plain handler.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.api.errors import error_body, error_response
from app.errors import ServiceError
from app.serving.answer import Answer, JsonObject

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Result = TypeVar("Result")


async def respond(
    request: Request, answer: Answer, *, stream: bool, headers: Mapping[str, str]
) -> Response:
    """Return the response that carries an answer, streamed or whole."""
    if stream:
        return EventStream(answer, headers)
    try:
        body = await unless_gone(request.receive, answer.body())
    except ServiceError as error:
        return error_response(error)
    finally:
        answer.abort()
    return JSONResponse(body, headers=dict(headers))


async def unless_gone(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """Await work, but give it up as soon as the client goes. Raises ClientDisconnect then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class EventStream(Response):
    """Server-sent events in OpenAI's form: data lines, then [DONE]; an error ends the stream."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**SSE_HEADERS, **headers})
        # A length of 0 is what Response knows of a body that is yet to come.
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await unless_gone(receive, self._send_events(send))
        except ClientDisconnect:
            logger.debug("client gone")
        finally:
            self._answer.abort()

    async def _send_events(self, send: Send) -> None:
        async for data in with_keep_alive(self._lines(), KEEP_ALIVE_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._answer.events():
                yield encode_event(event)
        except ServiceError as error:
            yield encode_event(error_body(error))
            return
        yield b"data: [DONE]\n\n"


def encode_event(event: JsonObject) -> bytes:
    """Return one event's bytes; JSON has no line breaks of its own."""
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8") + b"\n\n"


async def with_keep_alive(lines: AsyncIterator[bytes], interval_s: float) -> AsyncIterator[bytes]:
    """Pass lines on, and a comment whenever there was none for a while.

    The pending read is waited for again after a comment, never cancelled: a cancelled read would
    end the generator behind it.
    """
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(_next(lines))
            done, _ = await asyncio.wait({pending}, timeout=interval_s)
            if not done:
                yield b": keep-alive\n\n"
                continue
            try:
                line = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield line
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


async def _next(lines: AsyncIterator[bytes]) -> bytes:
    return await anext(lines)
