"""How much may wait, and when a place will be free again. Knows nothing of who asks.

The queue is bounded by sequences and by prompt tokens: what waits costs memory, and an answer that
comes too late is worth nothing. Whoever is refused is told to come back when as many places should
be free as there are callers before it, at the pace at which sequences have ended of late: busy time
over ends, both forgotten evenly with time. Intervals between ends would say less: most are nothing,
for sequences that begin together end in one step.
"""

import math
import time
from collections.abc import Callable

from app.errors import Overloaded

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
MEMORY_S = 30.0  # of busy time, after which an end counts for 1/e of a new one


class Admission:
    """Counts what waits. Used on the event loop only."""

    def __init__(
        self,
        max_num_queued_seqs: int,
        max_num_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_seqs = max_num_queued_seqs
        self._max_tokens = max_num_queued_tokens
        self._clock = clock
        self._num_tokens = 0
        self._num_refused = 0  # since a place was last free
        self.num_refused_seqs = 0  # for the number of sequences, ever
        self.num_refused_tokens = 0  # for the number of prompt tokens, ever
        self._counted_s: float | None = None  # up to when busy time is counted; None: idle
        self._busy_s = 0.0
        self._num_ends = 0.0

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of the requests of which nothing has come yet."""
        return self._num_tokens

    def check(self, num_waiting: int, num_seqs: int, num_tokens: int) -> None:
        """Raise Overloaded unless so many sequences and prompt tokens more may wait.

        Nothing that waits alone is refused for its length: it fits the context.
        """
        self._refuse_excess(num_waiting, num_seqs, num_tokens)
        self._num_refused = 0

    def check_room(self, num_waiting: int) -> None:
        """Raise Overloaded if `check` would, whatever was asked for."""
        self._refuse_excess(num_waiting, 1, 1)

    def _refuse_excess(self, num_waiting: int, num_seqs: int, num_tokens: int) -> None:
        has_too_many = num_waiting + num_seqs > self._max_seqs
        is_too_long = self._num_tokens and self._num_tokens + num_tokens > self._max_tokens
        if has_too_many or is_too_long:
            self.num_refused_seqs += has_too_many
            self.num_refused_tokens += not has_too_many
            self._num_refused += 1
            error = Overloaded("Too many requests are waiting. Please try again later.")
            error.retry_after_s = self._retry_after_s()
            raise error

    def _retry_after_s(self) -> float:
        if not self._num_ends:
            return MIN_RETRY_S
        wait_s = self._num_refused * self._busy_s / self._num_ends
        return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)

    def enter(self, num_tokens: int) -> None:
        """Count the prompt of a request that begins to wait."""
        self._num_tokens += num_tokens
        if self._counted_s is None:
            self._counted_s = self._clock()

    def leave(self, num_tokens: int) -> None:
        """Count out a prompt: its first output has come, or its end."""
        self._num_tokens -= num_tokens

    def end(self, num_live: int) -> None:
        """Take note of the end of a sequence, `num_live` of which are left."""
        now = self._clock()
        if self._counted_s is not None:
            passed_s = now - self._counted_s
            kept = math.exp(-passed_s / MEMORY_S)
            self._busy_s = kept * self._busy_s + passed_s
            self._num_ends = kept * self._num_ends + 1
        # A pause with nothing to do says nothing of the pace.
        self._counted_s = now if num_live else None
