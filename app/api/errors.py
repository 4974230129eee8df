"""Every failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.errors import MethodNotAllowed, NotFound, RateLimited, ServiceError, Unavailable


def error_body(error: ServiceError) -> dict[str, object]:
    """Return the JSON of an error."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return {"error": fields}


def error_response(error: ServiceError) -> JSONResponse:
    """Return the response of an error; a client may retry only what is worth it."""
    headers = {}
    wait_s = error.retry_after_s if isinstance(error, Unavailable | RateLimited) else None
    if wait_s is not None:
        milliseconds = math.ceil(round(1000 * wait_s, 3))  # a sum of floats is rarely even
        headers = {
            "retry-after": str(math.ceil(milliseconds / 1000)),
            "retry-after-ms": str(milliseconds),
        }
    headers["x-should-retry"] = "false" if wait_s is None else "true"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


def count_error(request: Request, error: ServiceError) -> None:
    """Have an error counted, once, when the answer starts."""
    request.state.error_code = error.code or error.type


async def on_service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    count_error(request, error)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer what the router refuses: an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    response = _response_of(request, error)
    request.state.error_code = "not_found" if error.status_code == 404 else "http_error"
    return response


def _response_of(request: Request, error: HTTPException) -> JSONResponse:
    path = request.scope["path"][:100]
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{request.method} is not allowed on {path}."))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return error_response(NotFound(f"Unknown path: {path}."))
    failure = ServiceError(str(error.detail))
    failure.status = error.status_code
    return error_response(failure)
