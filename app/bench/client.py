"""What one streamed answer amounts to, of whatever server: its tokens, and when they came."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from app.bench.peer import PeerFault

Event = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one answer took; instants are seconds of the monotonic clock."""

    started_s: float
    first_token_s: float
    last_token_s: float
    ended_s: float
    num_output_tokens: int
    num_prompt_tokens: int | None = None  # as the server counts them, if it says
    arrivals_s: tuple[float, ...] = ()  # of each event with text

    @property
    def first_token_delay_s(self) -> float:
        return self.first_token_s - self.started_s

    @property
    def decode_tokens_per_s(self) -> float:
        """The rate after the first token, whose time is the prompt's; inf if all came at once."""
        seconds = self.last_token_s - self.first_token_s
        return (self.num_output_tokens - 1) / seconds if seconds else math.inf


def completion_of(
    events: Iterable[tuple[float, Event]], started_s: float, ended_s: float, num_output: int | None
) -> Completion:
    """Say what the events of a stream, each with its instant, amount to.

    Raises PeerFault for an error among them, or where there are not `num_output` tokens, if given.
    """
    arrivals_s: list[float] = []
    usage: Event = {}
    for instant_s, event in events:
        if "error" in event:
            raise PeerFault(f"broke off: {one_line(json.dumps(event['error']))}")
        if _has_text(event):
            arrivals_s.append(instant_s)
        said = event.get("usage")
        if isinstance(said, dict) and said.get("completion_tokens"):
            usage = said
    num_answered = cast(int, usage.get("completion_tokens", len(arrivals_s)))
    if num_output is not None and num_answered != num_output:
        raise PeerFault(f"answered {num_answered} tokens where {num_output} were asked for")
    return Completion(
        started_s=started_s,
        # A token whose text is held back, such as half a character, shows at the end alone.
        first_token_s=arrivals_s[0] if arrivals_s else ended_s,
        last_token_s=arrivals_s[-1] if arrivals_s else ended_s,
        ended_s=ended_s,
        num_output_tokens=num_answered,
        num_prompt_tokens=cast(int | None, usage.get("prompt_tokens")),
        arrivals_s=tuple(arrivals_s),
    )


def refusal(status: int, body: bytes) -> PeerFault:
    """Return the fault of an answer that is no stream."""
    return PeerFault(f"answered {status}: {one_line(body.decode('utf-8', 'replace'))}")


def event_of(line: bytes) -> Event | None:
    """Return the JSON object of a data line, None for any other line."""
    payload = line.removeprefix(b"data:").strip()
    if not (payload.startswith(b"{") and line.startswith(b"data:")):
        return None
    return cast(Event, json.loads(payload))


def _has_text(event: Event) -> bool:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    choice = cast(Event, choices[0])
    delta = choice.get("delta")
    return bool(choice.get("text") or (isinstance(delta, dict) and delta.get("content")))


def one_line(text: str) -> str:
    """Return the beginning of a text, on one line."""
    return " ".join(text.split())[:300]
