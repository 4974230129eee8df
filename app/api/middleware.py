"""What stands before every route: a request id, the key, and an answer to whatever goes wrong.

Pure ASGI, one pass. Paths are taken from the scope as they are routed, never put together from
headers, so that what is checked is what is served.
"""

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.api.routes.static import PAGE_FILES
from app.errors import ServiceError, Unauthorized

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", *PAGE_FILES})
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class Gate:
    """Names each request, lets in who has a key, and turns stray exceptions into a 500."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_named(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._may_enter(path, headers):
            refusal = Unauthorized("No API key was given, or a wrong one.")
            await error_response(refusal)(scope, receive, send_named)
            return
        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            logger.debug("request %s: client gone", request_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if has_started:
                raise
            failure = ServiceError("The server had an internal error.")
            await error_response(failure)(scope, receive, send_named)

    def _may_enter(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._digests or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip()
        digest = hashlib.sha256(key).digest()
        # Every key is compared in full, so that time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and bool(key) and any(matches)


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Keep the client's id if it is harmless in a log line and a header, else make one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _SANE_ID.match(given) else uuid.uuid4().hex
