"""A request's body: read under a cap, parsed strictly, off the event loop if it is large."""

import asyncio
import re
from typing import TypeVar

from starlette.requests import Request

from app.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from app.protocol.common import WireModel, parse_json, validate

OFFLOADED_BYTES = 64 << 10
MAX_IGNORED_SHOWN = 32

Model = TypeVar("Model", bound=WireModel)


async def read_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """Return the validated body. Raises ClientError."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("The body must be sent as application/json.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise PayloadTooLarge(f"The body is larger than {max_bytes} bytes.")
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise PayloadTooLarge(f"The body is larger than {max_bytes} bytes.")
        chunks.append(chunk)
    body = b"".join(chunks)
    if not body:
        raise InvalidRequest("The body is empty.")

    def parse() -> Model:
        return validate(model, parse_json(body))

    return await asyncio.to_thread(parse) if num_bytes > OFFLOADED_BYTES else parse()


def ignored_header(body: WireModel) -> dict[str, str]:
    """Return the header that names fields without effect. Raises InvalidRequest for unsupported."""
    names = body.ignored_fields()
    if not names:
        return {}
    # A name may be empty; a header may neither be nor end with a blank.
    safe = [re.sub("[^A-Za-z0-9.]", "_", name[:64]) or "_" for name in names[:MAX_IGNORED_SHOWN]]
    return {"x-ignored-fields": ", ".join(safe)}
