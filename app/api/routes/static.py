"""GET / and /static/*: the playground, a fixed table of files read once.

Open without a key, since the page is what asks for one: it holds nothing of the model's. Its policy
lets in nothing from elsewhere and no inline code. Knows nothing of what the page does.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_FOLDER = Path(__file__).resolve().parent.parent / "static"
_STYLE = "text/css; charset=utf-8"
_SCRIPT = "text/javascript; charset=utf-8"
PAGE_FILES: Mapping[str, tuple[str, str]] = {  # path -> file, content type
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/playground.css": ("playground.css", _STYLE),
    "/static/layout.css": ("layout.css", _STYLE),
    "/static/tokens.css": ("tokens.css", _STYLE),
    "/static/playground.js": ("playground.js", _SCRIPT),
    "/static/alternatives.js": ("alternatives.js", _SCRIPT),
    "/static/answer.js": ("answer.js", _SCRIPT),
    "/static/api.js": ("api.js", _SCRIPT),
    "/static/code.js": ("code.js", _SCRIPT),
    "/static/dialogs.js": ("dialogs.js", _SCRIPT),
    "/static/dom.js": ("dom.js", _SCRIPT),
    "/static/engine.js": ("engine.js", _SCRIPT),
    "/static/settings.js": ("settings.js", _SCRIPT),
    "/static/turns.js": ("turns.js", _SCRIPT),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache",  # kept, but asked about each time: names carry no version
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def static_routes() -> APIRouter:
    """Return the routes of the page, its files in memory."""
    router = APIRouter(redirect_slashes=False)
    for path, (name, content_type) in PAGE_FILES.items():
        router.add_api_route(
            path,
            _file_route((_FOLDER / name).read_bytes(), content_type),
            methods=["GET", "HEAD"],
            include_in_schema=False,
        )
    return router


def _file_route(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag}

    async def serve_file(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if known == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=content_type)

    return serve_file
