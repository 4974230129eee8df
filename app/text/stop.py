"""Stop strings, found across any borders between pieces of text.

The rule: the stop string that is complete first cuts the text; of those that are complete at the
same character, the one that began first (the longest). So of two that begin at one place the
shorter wins, and where the text was split into pieces never matters.
Method: Aho and Corasick, "Efficient string matching" (1975).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found; `text` is what came before it and was not given out yet."""

    text: str
    stop: str


class StopMatcher:
    """Find the first stop string in a text that comes in pieces, in linear time.

    The state after each character is the longest suffix that begins a stop string. That suffix,
    and nothing more, is held back: at most one character less than the longest stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._build(stops)
        self._first_letters = frozenset(self._next[0])
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """Return the text that no stop string can reach any more, or the match."""
        if self._state == 0 and self._first_letters.isdisjoint(text):
            return text
        following, fallback, state = self._next, self._fallback, self._state
        for place, letter in enumerate(text):
            while state and letter not in following[state]:
                state = fallback[state]
            state = following[state].get(letter, 0)
            stop = self._found[state]
            if stop:
                seen = self._held + text[: place + 1]
                self._held, self._state = "", 0
                return StopMatch(seen[: len(seen) - len(stop)], stop)
        self._state = state
        seen = self._held + text
        free = len(seen) - self._depth[state]
        self._held = seen[free:]
        return seen[:free]

    def flush(self) -> str:
        """Return the text held back: no more will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _build(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found = [""]  # the longest stop string that a state ends with
        for stop in stops:
            state = 0
            for letter in stop:
                if letter not in self._next[state]:
                    self._next[state][letter] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._found.append("")
                state = self._next[state][letter]
            self._found[state] = stop
        self._fallback = [0] * len(self._next)  # the longest proper suffix that is a state
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for letter, child in self._next[state].items():
                queue.append(child)
                suffix = self._fallback[state]
                while suffix and letter not in self._next[suffix]:
                    suffix = self._fallback[suffix]
                self._fallback[child] = self._next[suffix].get(letter, 0)
                self._found[child] = self._found[child] or self._found[self._fallback[child]]
