"""What became of a request, event by event: written by the worker, read by anybody at any time."""

import time
from typing import Literal, NamedTuple

EventName = Literal["queued", "admitted", "prefill", "first_token", "preempted", "done"]

MAX_EVENTS = 512  # from here on, chunks and preemptions are only counted


class TimelineEvent(NamedTuple):
    """One event of one choice, on the monotonic clock.

    `num_tokens` are with "admitted" those found in the prefix cache, with "prefill" those of the
    chunk that was planned; `reason` is why it is "done".
    """

    at_s: float
    name: EventName
    choice: int
    num_tokens: int = 0
    reason: str | None = None


class Timeline:
    """The events of a request, in order."""

    __slots__ = ("events", "num_dropped")

    def __init__(self) -> None:
        self.events: list[TimelineEvent] = []
        self.num_dropped = 0

    def note(
        self, name: EventName, choice: int, num_tokens: int = 0, reason: str | None = None
    ) -> None:
        """Add an event that happens now; a request that goes on for ever fills no memory."""
        is_needed = name in ("queued", "first_token", "done")
        if len(self.events) >= MAX_EVENTS and not is_needed:
            self.num_dropped += 1
            return
        self.events.append(TimelineEvent(time.monotonic(), name, choice, num_tokens, reason))

    def first(self, name: EventName, choice: int) -> float | None:
        """Return when something first happened to a choice, if it has."""
        return next((e.at_s for e in self.events if e.name == name and e.choice == choice), None)
