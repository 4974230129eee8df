"""An answer under way: the same events are streamed, or folded into one body."""

import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.protocol.common import SamplingFields

JsonObject = dict[str, object]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode_json(value: JsonObject) -> bytes:
    """Return the JSON of a chunk; it has no line breaks of its own."""
    return _encode(value).encode()


class TextChunks:
    """The chunks of one choice that differ in their text alone: the rest is encoded once."""

    def __init__(self, chunk_of: Callable[[str], JsonObject]) -> None:
        mark = uuid.uuid4().hex
        self._before, self._after = _encode(chunk_of(mark)).split(_encode(mark))

    def encode(self, text: str) -> bytes:
        """Return what `encode_json` makes of the chunk with this text."""
        return f"{self._before}{_encode(text)}{self._after}".encode()


class Answer(Protocol):
    """A request that the engine has accepted.

    Either `events` or `body` is consumed, once; `abort` is called whatever happens.
    """

    def events(self) -> AsyncIterator[Sequence[bytes]]:
        """Yield the chunks of a stream as JSON, at each wake-up all that have come."""
        ...

    async def body(self) -> JsonObject:
        """Return the whole answer: the fold of the same deltas."""
        ...

    def abort(self) -> None:
        """Stop generating what is not yet generated."""
        ...

    def timing(self) -> dict[str, float]:
        """Return what took how many seconds, as far as it has come."""
        ...

    def num_tokens(self) -> int:
        """Return the tokens of the prompts and of what was given out so far."""
        ...


class ResumableAnswer(Answer, Protocol):
    """An answer whose request may leave the engine and come back."""

    def park(self) -> None:
        """Free what the engine holds; `events` and `body` wait."""
        ...

    async def resume(self) -> None:
        """Go on, not a token lost or repeated. Raises ServerError; then it stays parked."""
        ...


@dataclass(frozen=True, slots=True)
class UsageOptions:
    """Which chunks of a stream carry usage."""

    at_end: bool
    in_each: bool


def usage_options(fields: SamplingFields) -> UsageOptions:
    options = fields.stream_options
    at_end = bool(options and options.include_usage)
    return UsageOptions(at_end, at_end and bool(options and options.continuous_usage_stats))
