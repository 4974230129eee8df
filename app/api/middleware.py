"""What stands before every route: a request id, the key, and an answer to whatever goes wrong.

Pure ASGI, one pass. Paths are taken from the scope as they are routed, never put together from
headers, so that what is checked is what is served.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.api.routes.static import PAGE_FILES
from app.errors import Forbidden, ServiceError, Unauthorized
from app.settings import ApiKey

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", *PAGE_FILES})
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class Gate:
    """Names each request, lets in who has a key, and turns stray exceptions into a 500.

    What is behind it finds in the scope's state `request_id`, `key_name`, None where no key is
    asked for, and `send`, the server's own: a stream's body may go there directly, past the layers
    that only change how an answer starts. What is put into `more_headers` is asked for headers
    when the answer starts, and what is put into `at_end` is called when all is over. An
    `error_code` that is left there is counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Sequence[ApiKey] = (),
        count_error: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._count_error = count_error
        self._key_of = {hashlib.sha256(key.key.encode()).digest(): key for key in api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["key_name"] = None
        state["send"] = send
        state["more_headers"] = []
        state["at_end"] = []
        has_started = False
        arrival_s = time.monotonic()

        async def send_named(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if (code := state.get("error_code")) is not None:
                    self._count_error(code)
                milliseconds = 1000 * (time.monotonic() - arrival_s)
                more = [pair for ask in state["more_headers"] for pair in ask().items()]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"server-timing", f"total;dur={milliseconds:.1f}".encode()),
                    *((name.encode(), value.encode()) for name, value in more),
                ]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._key_of and path not in OPEN_PATHS:
            key = self._key(scope["headers"])
            state["key_name"] = key.name if key is not None else None
            if refusal := _refusal(key, path):
                state["error_code"] = refusal.code
                await error_response(refusal)(scope, receive, send_named)
                return
        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            logger.debug("request %s: client gone", request_id, extra={"request_id": request_id})
        except Exception:
            logger.exception("request %s failed", request_id, extra={"request_id": request_id})
            if has_started:
                raise
            failure = ServiceError("The server had an internal error.")
            state["error_code"] = failure.code
            await error_response(failure)(scope, receive, send_named)
        finally:
            # A connection outlives its answers, and with it the scope: nothing of them stays there.
            calls, state["at_end"] = state["at_end"], []
            for call in calls:
                call()

    def _key(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey | None:
        """Return the key that was sent, if it is one of those that are known."""
        values = [value for name, value in headers if name == b"authorization"]
        # Of two, a proxy in front may have looked at the other.
        scheme, _, sent = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(sent.strip()).digest()
        # Every key is compared in full, so that time tells nothing.
        matches = [key for known, key in self._key_of.items() if hmac.compare_digest(digest, known)]
        is_key = scheme.lower() == b"bearer" and bool(sent.strip())
        return matches[0] if matches and is_key else None


def _refusal(key: ApiKey | None, path: str) -> ServiceError | None:
    """Return why a key does not open a path, if it does not."""
    if key is None:
        return Unauthorized("No API key was given, or a wrong one.")
    if key.scope == "metrics" and path != METRICS_PATH:
        return Forbidden("This API key may only read /metrics.")
    return None


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Keep the client's id if it is harmless in a log line and a header, else make one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _SANE_ID.match(given) else uuid.uuid4().hex
