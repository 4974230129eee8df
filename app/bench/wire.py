"""A client that costs next to nothing while it measures: bytes and instants now, events later.

One connection a request, which the server closes at the end. What arrives is kept with its
instant, and read as HTTP and server-sent events once everything is over, so that hundreds of
streams do not wait for the client's own parsing.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from app.bench.client import Completion, Event, completion_of, event_of, refusal
from app.bench.peer import PeerFault, WireRequest

Part = tuple[float, bytes]  # instant, what arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is: http or https, host, port, and what its paths begin with."""

    is_secure: bool
    host: str
    port: int
    prefix: str
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, base_url: str, headers: Sequence[tuple[str, str]] = ()) -> "Address":
        """Read a base URL, with or without /v1 at its end. Raises ValueError."""
        url = urlsplit(base_url.rstrip("/").removesuffix("/v1"))
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{base_url} is no http:// or https:// URL")
        is_secure = url.scheme == "https"
        return cls(
            is_secure=is_secure,
            host=url.hostname,
            port=url.port or (443 if is_secure else 80),
            prefix=url.path.rstrip("/"),
            headers=tuple(headers),
        )

    @property
    def url(self) -> str:
        """The base URL again, without /v1."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_secure else 'http'}://{host}:{self.port}{self.prefix}"


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request that was sent, and what came back so far."""

    started_s: float = 0.0
    ended_s: float = 0.0
    parts: list[Part] = field(default_factory=list)

    def completion(self, num_output: int | None = None) -> Completion:
        """Read the answer. Raises PeerFault when it is refused, cut off or of another length."""
        status, is_chunked, parts = _head(self.parts)
        is_whole = False
        if is_chunked:
            parts, is_whole = _unchunked(parts)
        if status != 200:
            raise refusal(status, b"".join(data for _, data in parts))
        events, is_done = _events(parts)
        if not (is_done or is_whole) and not any("error" in event for _, event in events):
            raise PeerFault("broke off: the stream has no end")
        return completion_of(events, self.started_s, self.ended_s, num_output)


class _Connection(asyncio.Protocol):
    """Sends one request and keeps what arrives until the server hangs up."""

    def __init__(self, request: bytes, exchange: Exchange) -> None:
        self._request = request
        self._exchange = exchange
        self.is_over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._exchange.started_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.parts.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self._exchange.ended_s = time.monotonic()
        if not self.is_over.done():
            self.is_over.set_result(error)


async def exchange(address: Address, request: WireRequest, timeout_s: float) -> Exchange:
    """Send a request on a connection of its own and take what comes. Raises PeerFault."""
    made = Exchange()
    connect = partial(_Connection, _encoded(address, request), made)
    context = ssl.create_default_context() if address.is_secure else None
    loop = asyncio.get_running_loop()
    transport = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, connection = await loop.create_connection(
                connect, address.host, address.port, ssl=context
            )
            await connection.is_over
    except TimeoutError as error:
        raise PeerFault(f"no end after {timeout_s:.0f} s") from error
    except OSError as error:
        raise PeerFault(f"cannot connect: {error}") from error
    finally:
        if transport is not None:
            transport.abort()
    return made


def _encoded(address: Address, request: WireRequest) -> bytes:
    body = json.dumps(request.body).encode()
    host = address.url.partition("://")[2].removesuffix(address.prefix)
    lines = [
        f"POST {address.prefix}{request.path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Accept: text/event-stream, application/json",
        "Connection: close",
        *(f"{name}: {value}" for name, value in address.headers),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _head(parts: Sequence[Part]) -> tuple[int, bool, list[Part]]:
    """Return status, whether the body is chunked, and the parts of the body."""
    head = b""
    for index, (instant_s, data) in enumerate(parts):
        head += data
        end = head.find(b"\r\n\r\n")
        if end >= 0:
            lines = head[:end].decode("latin-1").lower().split("\r\n")
            words = lines[0].split()
            if len(words) < 2 or not words[1].isdecimal():
                break
            is_chunked = any(
                line.startswith("transfer-encoding:") and "chunked" in line for line in lines
            )
            return int(words[1]), is_chunked, [(instant_s, head[end + 4 :]), *parts[index + 1 :]]
    raise PeerFault("broke off: no answer in HTTP")


def _unchunked(parts: Sequence[Part]) -> tuple[list[Part], bool]:
    """Take the framing out of a chunked body; return its parts, and whether its end is there.

    What is there of a chunk counts when it arrives.
    """
    found: list[Part] = []
    rest, num_left = b"", 0
    for instant_s, data in parts:
        rest += data
        while rest:
            if num_left:
                piece, rest = rest[:num_left], rest[num_left:]
                num_left -= len(piece)
                found.append((instant_s, piece))
                continue
            line, newline, behind = rest.lstrip(b"\r\n").partition(b"\r\n")
            if not newline:
                break
            try:
                num_left = int(line.partition(b";")[0], 16)
            except ValueError as error:
                raise PeerFault("broke off: its chunks cannot be read") from error
            rest = behind
            if not num_left:
                return found, True
    return found, False


def _events(parts: Sequence[Part]) -> tuple[list[tuple[float, Event]], bool]:
    """Return the events with the instants at which they were whole, and whether [DONE] came."""
    events = []
    is_done = False
    for instant_s, line in _lines(parts):
        event = event_of(line)
        if event is not None:
            events.append((instant_s, event))
        is_done = is_done or line.strip() == b"data: [DONE]"
    return events, is_done


def _lines(parts: Sequence[Part]) -> Iterator[Part]:
    rest = b""
    for instant_s, data in parts:
        *lines, rest = (rest + data).split(b"\n")
        yield from ((instant_s, line) for line in lines)
    if rest:
        yield parts[-1][0], rest
