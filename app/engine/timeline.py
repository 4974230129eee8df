"""What became of a request, event by event: written by the worker, read by anybody at any time."""

import time
from collections.abc import Sequence
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

    __slots__ = ("_choices", "_whole", "events", "num_dropped")

    def __init__(self) -> None:
        self.events: list[TimelineEvent] = []
        self.num_dropped = 0
        self._whole: Timeline | None = None
        self._choices: Sequence[int] = ()

    def part(self, choices: Sequence[int]) -> "Timeline":
        """Return one that notes its choices' events here, the first as `choices[0]`, and so on."""
        part = Timeline()
        part._whole, part._choices = self, choices
        return part

    def note(
        self, name: EventName, choice: int, num_tokens: int = 0, reason: str | None = None
    ) -> None:
        """Add an event that happens now; a request that goes on for ever fills no memory."""
        if self._whole is not None:
            self._whole.note(name, self._choices[choice], num_tokens, reason)
            return
        is_needed = name in ("queued", "first_token", "done")
        if len(self.events) >= MAX_EVENTS and not is_needed:
            self.num_dropped += 1
            return
        self.events.append(TimelineEvent(time.monotonic(), name, choice, num_tokens, reason))

    def first(self, name: EventName, choice: int) -> float | None:
        """Return when something first happened to a choice, if it has."""
        return next((e.at_s for e in self.events if e.name == name and e.choice == choice), None)
