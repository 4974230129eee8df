"""Every error that a client can see, with its HTTP status and OpenAI's fields.

ServiceError
├── ClientError                 the request is at fault; a retry would fail again
│   ├── InvalidRequest          400
│   │   └── ContextLengthExceeded   400, code context_length_exceeded
│   ├── Unauthorized            401
│   ├── Forbidden               403, the key is not for this
│   ├── NotFound                404
│   │   └── ModelNotFound           404, code model_not_found
│   ├── MethodNotAllowed        405
│   ├── RequestTimeout          408
│   ├── IdempotencyConflict     409, the key was used for another body
│   ├── ResumeExpired           410, what was to be continued is gone
│   ├── PayloadTooLarge         413
│   ├── UnsupportedMediaType    415
│   ├── RateLimited             429, a quota of the key is used up
│   └── HeadersTooLarge         431
└── ServerError                 the server is at fault
    ├── EngineFailed            500, this request's step failed
    ├── DeadlineExceeded        504, the time that the client gave is over
    └── Unavailable             503, worth a retry elsewhere or later
        ├── EngineDead              the worker has stopped
        ├── Draining                shutting down
        ├── Overloaded              the queue is full
        └── TooManyConnections      over the cap on open connections

Messages are written for the user of the API: no paths, addresses or reprs of objects.
"""


class ServiceError(Exception):
    """An answer other than success: HTTP status, OpenAI's `type`, `code` and `param`."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ClientError(ServiceError):
    """The request is at fault."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None


class InvalidRequest(ClientError):
    """A body, field or value that cannot be served."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested tokens do not fit the context."""

    code: str | None = "context_length_exceeded"


class Unauthorized(ClientError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code: str | None = "invalid_api_key"


class Forbidden(ClientError):
    """The key is a good one, but not for this."""

    status = 403
    type = "permission_error"
    code: str | None = "insufficient_permissions"


class NotFound(ClientError):
    """No such route or object."""

    status = 404
    type = "not_found_error"
    code: str | None = "not_found"


class ModelNotFound(NotFound):
    """The named model is not served here."""

    code: str | None = "model_not_found"


class MethodNotAllowed(ClientError):
    """The route exists, the method does not."""

    status = 405
    code: str | None = "method_not_allowed"


class RequestTimeout(ClientError):
    """The request did not arrive in time."""

    status = 408
    code: str | None = "request_timeout"


class IdempotencyConflict(ClientError):
    """An idempotency key was used for another body."""

    status = 409
    code: str | None = "idempotency_key_reused"


class ResumeExpired(ClientError):
    """The stream that was to be continued is not kept any more."""

    status = 410
    code: str | None = "resume_window_expired"


class PayloadTooLarge(ClientError):
    """The body is over the limit."""

    status = 413
    code: str | None = "payload_too_large"


class UnsupportedMediaType(ClientError):
    """The body is not JSON."""

    status = 415
    code: str | None = "unsupported_media_type"


class RateLimited(ClientError):
    """A quota of the key is used up; `type` says which, as OpenAI's does.

    Without `retry_after_s` the request can never fit.
    """

    status = 429
    type = "rate_limit_error"
    code: str | None = "rate_limit_exceeded"

    def __init__(self, message: str, *, kind: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.type = kind
        self.retry_after_s = retry_after_s


class HeadersTooLarge(ClientError):
    """The request line and headers are over the limit."""

    status = 431
    code: str | None = "headers_too_large"


class ServerError(ServiceError):
    """The server is at fault."""


class EngineFailed(ServerError):
    """The step that carried this request failed."""

    code: str | None = "engine_error"


class DeadlineExceeded(ServerError):
    """The time that the client gave for the request is over."""

    status = 504
    type = "timeout_error"
    code: str | None = "deadline_exceeded"


class Unavailable(ServerError):
    """The server cannot take the request now."""

    status = 503
    type = "service_unavailable_error"
    code: str | None = "unavailable"
    retry_after_s: float = 1.0


class EngineDead(Unavailable):
    """The worker thread has stopped and will not come back."""

    code: str | None = "engine_dead"


class Draining(Unavailable):
    """The server is shutting down."""

    code: str | None = "shutting_down"


class Overloaded(Unavailable):
    """The queue is full."""

    code: str | None = "overloaded"


class TooManyConnections(Unavailable):
    """The cap on open connections is reached."""

    code: str | None = "too_many_connections"
