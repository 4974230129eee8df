"""Open connections: how many there may be, whose they are, and how long each may keep us waiting.

Uvicorn on h11 knows no deadline for a request and no cap, and speaks plain text when it refuses.
What is added here sits where bytes arrive, so that a streamed token pays nothing for it. Knows of
the application only the paths of its probes, which are answered when everything else is refused.
"""

import asyncio
import ipaddress
import socket
import uuid
from collections import Counter
from enum import StrEnum
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from app.api.errors import error_response
from app.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
)
from app.settings import ServerSettings
from model.errors import ConfigError

CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
PROBES = frozenset({b"/health", b"/health/live", b"/health/ready"})
MAX_HEADERS = 128
MAX_HEADER_BYTES = 16 << 10  # request line and headers together
MAX_SMALL_PIECES = 4096  # of a body, before their average size counts
MIN_PIECE_BYTES = 64
SLICE_BYTES = 32 << 10  # what h11 is fed at once: headers are never larger when they are parsed
NUM_RESERVED = 256  # connections above the cap, on which only probes are answered
RESERVED_TIMEOUT_S = 2.0
IDLE_GRACE_S = 1.0  # a connection without a request is not closed for another's sake before
LINGER_S = 2.0  # for a client to stop sending and read why it was refused
# A peer that vanished without a word: asked after when nothing has come, given up when nothing that
# was sent has been acknowledged. Names that a system lacks are left out.
VANISHED = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,  # milliseconds
}
_NEEDED = (
    "send_400_response",
    "on_response_complete",
    "timeout_keep_alive_handler",
    "shutdown",
    "pause_writing",
    "resume_writing",
)
_TRANSPORT = (
    "abort",
    "can_write_eof",
    "get_extra_info",
    "is_closing",
    "pause_reading",
    "resume_reading",
    "write",
    "write_eof",
)


class Phase(StrEnum):
    """Where a connection is; each phase but BUSY has its deadline."""

    IDLE = "between requests"  # uvicorn's keep-alive timer
    HEADERS = "opened, or in the middle of headers"
    BODY = "headers read, body not yet"
    BUSY = "request read, answer not yet sent"
    EXCESS = "answered, but the body still comes"
    LEAVING = "refused; what still comes is dropped"
    CLOSING = "closed, once the client has taken what was sent"


class StrictConnection(h11.Connection):
    """h11's reading of HTTP/1.1, with the bounds that h11 leaves to others."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self.only_probes = False
        self.refusal: ServiceError | None = None
        self._num_pieces = 0
        self._num_bytes = 0
        self._sends_chunks = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]  # its overloads
        """Return the bytes of an event; those of a stream's chunk without h11's ceremony."""
        if self._sends_chunks and type(event) is h11.Data and event.data:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        output = super().send(event)
        # Whether a body goes in chunks is for h11 to say, and it says so in the head.
        is_head = isinstance(event, h11.Response)
        self._sends_chunks = is_head and CHUNKED in (output or b"").lower()
        return output

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event. Raises RemoteProtocolError, and then `refusal` says why."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            # Its text is not passed on: it may quote what was sent.
            self.refusal = InvalidRequest("The request is not valid HTTP/1.1.")
            if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
                self.refusal = HeadersTooLarge(
                    f"Request line and headers are larger than {MAX_HEADER_BYTES} bytes."
                )
            raise
        if isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            self.refusal = self._fault_of_body()
        elif isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
            self.refusal = self._fault_of_request(event)
        if self.refusal is not None:
            raise h11.RemoteProtocolError(self.refusal.message)
        return event

    def _fault_of_request(self, request: h11.Request) -> ServiceError | None:
        if request.http_version not in (b"1.0", b"1.1"):
            return InvalidRequest("This server speaks HTTP/1.1.")
        headers = list(request.headers)
        if len(headers) > MAX_HEADERS:
            return HeadersTooLarge(f"There are more than {MAX_HEADERS} headers.")
        size = len(request.target) + sum(len(name) + len(value) for name, value in headers)
        if size > MAX_HEADER_BYTES:
            return HeadersTooLarge(
                f"Request line and headers are larger than {MAX_HEADER_BYTES} bytes."
            )
        names = {name for name, _ in headers}
        # A proxy in front may believe the other of the two lengths: the way requests are smuggled.
        if b"transfer-encoding" in names and (
            b"content-length" in names or request.http_version == b"1.0"
        ):
            return InvalidRequest("The length of the body is given in two ways.")
        if self.only_probes and request.target.partition(b"?")[0] not in PROBES:
            return TooManyConnections("There are too many open connections.")
        return None

    def _fault_of_body(self) -> ServiceError | None:
        # A chunk of one byte costs as much as one of a thousand.
        is_dust = self._num_bytes < self._num_pieces * MIN_PIECE_BYTES
        if self._num_pieces > MAX_SMALL_PIECES and is_dust:
            return InvalidRequest("The body comes in too many small pieces.")
        return None


class OpenConnections:
    """Who is connected. At the cap, the connection that has idled longest makes room."""

    def __init__(self, max_open: int, max_per_client: int) -> None:
        self._max_open = max_open
        self._max_per_client = max_per_client
        self._client_of: dict[GuardedProtocol, str] = {}
        self._num_of: Counter[str] = Counter()
        self._idle_since: dict[GuardedProtocol, float] = {}  # longest first
        self._reserved: dict[GuardedProtocol, None] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._client_of) + len(self._reserved)

    def admit(self, connection: "GuardedProtocol", client: str, now_s: float) -> None:
        """Take a connection in; above a cap, into the reserve."""
        is_over = 0 < self._max_per_client <= self._num_of[client]
        if not is_over and 0 < self._max_open <= len(self._client_of):
            is_over = not self._make_room(now_s)
        if not is_over:
            self._client_of[connection] = client
            self._num_of[client] += 1
            return
        if len(self._reserved) >= NUM_RESERVED:
            # The newest stay: a probe speaks as soon as it is connected, a flood may not.
            oldest = next(iter(self._reserved))
            oldest.transport.abort()
            self.release(oldest)
        self._reserved[connection] = None

    def is_reserved(self, connection: "GuardedProtocol") -> bool:
        return connection in self._reserved

    def release(self, connection: "GuardedProtocol") -> None:
        """Forget a connection; again is no mistake."""
        self._reserved.pop(connection, None)
        self._idle_since.pop(connection, None)
        client = self._client_of.pop(connection, None)
        if client is not None:
            self._num_of[client] -= 1
            if not self._num_of[client]:
                del self._num_of[client]

    def note(self, connection: "GuardedProtocol", *, is_idle: bool, now_s: float) -> None:
        """Note that a connection has begun or ceased to be without a request."""
        self._idle_since.pop(connection, None)
        if is_idle and connection in self._client_of:
            self._idle_since[connection] = now_s

    def _make_room(self, now_s: float) -> bool:
        for connection, since_s in self._idle_since.items():
            if now_s - since_s < IDLE_GRACE_S:
                return False
            connection.transport.abort()
            self.release(connection)
            return True
        return False


class EdgeConfig(uvicorn.Config):
    """Uvicorn's configuration of this service, with what its connections share."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        missing = [name for name in _NEEDED if not hasattr(H11Protocol, name)]
        if missing:
            raise ConfigError(
                f"uvicorn {uvicorn.__version__} is not supported: H11Protocol lacks {missing[0]}"
            )
        super().__init__(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            access_log=settings.log_level == "debug",
            ssl_keyfile=settings.ssl_keyfile,
            ssl_certfile=settings.ssl_certfile,
            root_path=settings.root_path,
            server_header=False,
            # Nothing asks for the client's address, and a header should not forge it in the log.
            proxy_headers=False,
        )
        self.settings = settings
        self.open_connections = OpenConnections(
            settings.max_connections, settings.max_connections_per_client
        )


class GuardedProtocol(H11Protocol):
    """A connection with deadlines for headers and body, refused in OpenAI's shape."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, EdgeConfig)
        self._settings = config.settings
        self._peers = config.open_connections
        self.conn = self._strict = StrictConnection()
        self._phase: Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        _ask_after_peer(transport.get_extra_info("socket"))
        self._close_now = transport.close
        methods = {name: getattr(transport, name) for name in _TRANSPORT}
        super().connection_made(
            cast(asyncio.Transport, SimpleNamespace(**methods, close=self._close))
        )
        self._peers.admit(self, client_of(self.client), self.loop.time())
        self._strict.only_probes = self._peers.is_reserved(self)
        self._enter(Phase.HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.release(self)
        self._cancel_deadline()
        self._cancel_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), SLICE_BYTES):
            if self._phase in (Phase.LEAVING, Phase.CLOSING):
                return
            super().data_received(data[start : start + SLICE_BYTES])
        self._enter(self._current_phase(Phase.HEADERS))

    def pause_writing(self) -> None:
        """Give a client that has let its buffers fill as long as one that sends a body."""
        super().pause_writing()
        if seconds := self._settings.body_timeout_s:
            self._stall = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall()

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is Phase.LEAVING:
            return
        self._phase = None  # another request, another deadline
        self._enter(self._current_phase(Phase.IDLE))

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._strict.refusal or InvalidRequest(msg))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._enter(self._current_phase(Phase.IDLE))

    def shutdown(self) -> None:
        if self._phase in (Phase.LEAVING, Phase.CLOSING):
            self._close_now()
            return
        super().shutdown()
        self._enter(self._current_phase(Phase.IDLE))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: anybody can ask for an upgrade, and the answer is an ordinary one."""

    def _current_phase(self, otherwise: Phase) -> Phase:
        if self._phase is Phase.LEAVING:
            return Phase.LEAVING
        if self.transport.is_closing():
            return Phase.CLOSING
        is_body_due = self.conn.their_state is h11.SEND_BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.BODY if is_body_due else Phase.BUSY
        return Phase.EXCESS if is_body_due else otherwise

    def _enter(self, phase: Phase) -> None:
        if phase is self._phase:
            return
        self._phase = phase
        self._cancel_deadline()
        is_of_use = phase in (Phase.BODY, Phase.BUSY, Phase.CLOSING)
        self._peers.note(self, is_idle=not is_of_use, now_s=self.loop.time())
        if seconds := self._seconds_of(phase):
            self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _seconds_of(self, phase: Phase) -> float:
        header_s = self._settings.header_timeout_s
        if phase is Phase.HEADERS:
            is_short = self._strict.only_probes
            return min(header_s or RESERVED_TIMEOUT_S, RESERVED_TIMEOUT_S) if is_short else header_s
        if phase in (Phase.BODY, Phase.CLOSING):
            return self._settings.body_timeout_s
        return LINGER_S if phase in (Phase.EXCESS, Phase.LEAVING) else 0.0

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        if self._phase is Phase.BODY:
            seconds = self._settings.body_timeout_s
            self._refuse(RequestTimeout(f"The body did not arrive within {seconds:g} s."))
        elif self._phase is Phase.HEADERS and self.conn.trailing_data[0]:
            self._refuse(RequestTimeout("The headers did not arrive in time."))
        else:
            # To who has said nothing, nothing is said: a client with a pool of connections could
            # take it for the answer to its next request.
            self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        """Answer if no answer has begun, then hang up once the client has had time to read it."""
        self._unset_keepalive_if_required()
        can_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not can_answer:
            self._close_now()
            self._enter(Phase.CLOSING)
            return
        self.transport.write(self._answer(error))
        self._linger()

    def _close(self) -> None:
        """Close, unless the client still sends: it shall read its answer first."""
        is_sending = self.conn.their_state is h11.SEND_BODY
        if is_sending and not self.transport.is_closing() and self._phase is not Phase.LEAVING:
            self._linger()
        else:
            self._close_now()

    def _linger(self) -> None:
        """Say that nothing more will come, and drop what is still sent, for a while.

        Closing at once with bytes unread would reset the connection and lose the answer.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._enter(Phase.LEAVING)

    def _answer(self, error: ServiceError) -> bytes:
        response = error_response(error)
        status = HTTPStatus(error.status)
        headers = [
            *self.server_state.default_headers,
            *response.raw_headers,
            (b"x-request-id", uuid.uuid4().hex.encode()),
            (b"connection", b"close"),
        ]
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
        lines += [b"%s: %s" % header for header in headers]
        return b"\r\n".join([*lines, b"", bytes(response.body)])


def _ask_after_peer(peer: socket.socket) -> None:
    """Have the kernel notice a peer that has vanished."""
    if peer.family not in (socket.AF_INET, socket.AF_INET6):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in VANISHED.items():
        if (option := getattr(socket, name, None)) is not None:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def client_of(address: tuple[str, int] | None) -> str:
    """Return whom a connection is counted for: an IPv4 address, or the /64 of an IPv6 one."""
    if address is None:
        return ""
    try:
        parsed = ipaddress.ip_address(address[0].partition("%")[0])
    except ValueError:
        return address[0]
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
