"""An answer under way: the same events are streamed, or folded into one body."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from app.protocol.common import SamplingFields

JsonObject = dict[str, object]


class Answer(Protocol):
    """A request that the engine has accepted.

    Either `events` or `body` is consumed, once; `abort` is called whatever happens.
    """

    def events(self) -> AsyncIterator[JsonObject]:
        """Yield the chunks of a stream, ready for the wire."""
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


@dataclass(frozen=True, slots=True)
class UsageOptions:
    """Which chunks of a stream carry usage."""

    at_end: bool
    in_each: bool


def usage_options(fields: SamplingFields) -> UsageOptions:
    options = fields.stream_options
    at_end = bool(options and options.include_usage)
    return UsageOptions(at_end, at_end and bool(options and options.continuous_usage_stats))
