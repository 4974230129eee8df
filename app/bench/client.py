"""The client, the same for every server: one streamed answer, timed as a user would see it."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import cast

import httpx

from app.bench.peer import PeerFault, WireRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one answer took; instants are seconds of the monotonic clock."""

    started_s: float
    first_token_s: float
    last_token_s: float
    ended_s: float
    num_output_tokens: int

    @property
    def first_token_delay_s(self) -> float:
        return self.first_token_s - self.started_s

    @property
    def decode_tokens_per_s(self) -> float:
        """The rate after the first token, whose time belongs to the prompt."""
        return (self.num_output_tokens - 1) / (self.last_token_s - self.first_token_s)


async def stream_completion(
    client: httpx.AsyncClient, request: WireRequest, num_output: int
) -> Completion:
    """Ask and read to the end.

    Raises PeerFault when the server refuses, breaks off, or answers with another length: a rate
    over fewer tokens would flatter it.
    """
    started_s = time.monotonic()
    first_token_s = last_token_s = None
    num_events, num_used = 0, None
    try:
        async with client.stream("POST", request.path, json=request.body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode("utf-8", "replace")
                raise PeerFault(f"answered {response.status_code}: {_one_line(text)}")
            async for event in _events(response):
                if "error" in event:
                    raise PeerFault(f"broke off: {_one_line(json.dumps(event['error']))}")
                if _has_text(event):
                    num_events += 1
                    last_token_s = time.monotonic()
                    first_token_s = first_token_s or last_token_s
                usage = event.get("usage")
                if isinstance(usage, dict) and usage.get("completion_tokens"):
                    num_used = usage["completion_tokens"]
    except httpx.HTTPError as error:
        raise PeerFault(f"broke off: {type(error).__name__} {_one_line(str(error))}") from error
    num_answered = num_events if num_used is None else num_used
    if num_answered != num_output:
        raise PeerFault(f"answered {num_answered} tokens where {num_output} were asked for")
    ended_s = time.monotonic()
    return Completion(
        started_s=started_s,
        # A token whose text is held back, such as half a character, shows at the end alone.
        first_token_s=first_token_s or ended_s,
        last_token_s=last_token_s or ended_s,
        ended_s=ended_s,
        num_output_tokens=num_answered,
    )


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, object]]:
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if payload.startswith(b"{") and line.startswith(b"data:"):
                yield json.loads(payload)


def _has_text(event: dict[str, object]) -> bool:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return False
    choice = cast(dict[str, object], choices[0])
    delta = choice.get("delta")
    return bool(choice.get("text") or (isinstance(delta, dict) and delta.get("content")))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
