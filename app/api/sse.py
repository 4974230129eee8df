"""Answers on the wire: one JSON body, or server-sent events as they come.

Either way the client's going away ends the work: Starlette would not tell a plain handler.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.api.errors import count_error, error_body, error_response
from app.errors import ServiceError
from app.serving.answer import Answer, encode_json
from app.serving.runs import FollowedAnswer

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Result = TypeVar("Result")


async def respond(
    request: Request, answer: Answer, *, stream: bool, headers: Mapping[str, str]
) -> Response:
    """Return the response that carries an answer, streamed or whole."""
    if stream and isinstance(answer, FollowedAnswer):
        return NumberedEventStream(answer, headers)
    if stream:
        return EventStream(answer, headers)
    try:
        body = await unless_gone(request.receive, answer.body())
    except ServiceError as error:
        count_error(request, error)
        return error_response(error)
    finally:
        answer.abort()
    parts = [f"{name};dur={1000 * seconds:.1f}" for name, seconds in answer.timing().items()]
    timing = {"server-timing": ", ".join(parts)} if parts else {}
    return JSONResponse(body, headers={**headers, **timing})


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            # What stands between looks at the start of an answer alone.
            await unless_gone(receive, self._send_events(scope["state"]))
        except ClientDisconnect:
            logger.debug("client gone", extra={"request_id": scope["state"]["request_id"]})
        finally:
            self._answer.abort()

    async def _send_events(self, state: Mapping[str, Any]) -> None:
        send: Send = state["send"]

        async def send_data(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await send_kept_alive(self._lines(state["request_id"]), send_data, KEEP_ALIVE_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self, request_id: str) -> AsyncIterator[bytes]:
        try:
            async for chunks in self._answer.events():
                yield self._framed(chunks)
        except ServiceError as error:
            yield b"data: %b\n\n" % encode_json(error_body(error))
            return
        except Exception:
            # Nobody behind this could still tell the client: its answer has begun.
            logger.exception("a stream failed", extra={"request_id": request_id})
            failure = ServiceError("The server had an internal error.")
            yield b"data: %b\n\n" % encode_json(error_body(failure))
            return
        yield b"data: [DONE]\n\n"

    def _framed(self, chunks: Sequence[bytes]) -> bytes:
        return b"data: %b\n\n" % b"\n\ndata: ".join(chunks)


class NumberedEventStream(EventStream):
    """A stream whose events have ids, RUN-NUMBER: a client may ask for those after one of them.

    [DONE] and errors have none: whoever comes back behind the last event is told again.
    """

    def __init__(self, answer: FollowedAnswer, headers: Mapping[str, str]) -> None:
        super().__init__(answer, headers)
        self._prefix = b"id: %b-" % answer.run_id.encode()
        self._number = answer.first

    def _framed(self, chunks: Sequence[bytes]) -> bytes:
        first, self._number = self._number, self._number + len(chunks)
        return b"".join(
            [
                b"%b%d\ndata: %b\n\n" % (self._prefix, number, chunk)
                for number, chunk in enumerate(chunks, start=first)
            ]
        )


async def send_kept_alive(
    lines: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[None]], interval_s: float
) -> None:
    """Send lines, and a comment whenever there was none for a while.

    The comments come from one task beside the stream: waiting for each line under a timeout
    would cost a task and a timer a token, and cancel the pending read.
    """
    clock = asyncio.get_running_loop().time
    sent_s = clock()

    async def keep_alive() -> None:
        nonlocal sent_s
        while True:
            silence_s = clock() - sent_s
            if silence_s < interval_s:
                await asyncio.sleep(interval_s - silence_s)
                continue
            await send(b": keep-alive\n\n")
            sent_s = clock()

    comments = asyncio.ensure_future(keep_alive())
    try:
        async for line in lines:
            await send(line)
            sent_s = clock()
    finally:
        comments.cancel()
        await asyncio.gather(comments, return_exceptions=True)
