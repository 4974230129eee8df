"""Who made a step fail: groups of sequences tried again by halves, until one fails alone.

Knows nothing of steps or blocks. A sequence is cleared by a token sampled in a step that
succeeded.
"""

from collections import deque

from app.engine.request import Sequence


class Suspects:
    """The groups that are yet to be tried, the next one first."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()

    def next_trial(self) -> list[Sequence]:
        """Return who is to run alone next; nobody once all are cleared."""
        while self._groups:
            left = [s for s in self._groups[0] if s.is_suspect and s.finish_reason is None]
            if left:
                self._groups[0] = left
                return left
            self._groups.popleft()
        return []

    def split(self, involved: list[Sequence]) -> Sequence | None:
        """Take note of who was in steps that failed; return the one that did it, if that is clear.

        One that fails alone is tried a second time: not every fault comes back.
        """
        trial = self.next_trial()
        if trial:
            self._groups.popleft()
            guilty_of = [sequence for sequence in trial if sequence in involved]
            # Who was not yet in a step of the trial is as suspect as before.
            if rest := [sequence for sequence in trial if sequence not in involved]:
                self._groups.appendleft(rest)
        else:
            guilty_of = involved
        if len(guilty_of) == 1:
            (sequence,) = guilty_of
            sequence.num_failed_alone += 1
            if sequence.num_failed_alone > 1:
                return sequence
        half = -(-len(guilty_of) // 2)
        for group in (guilty_of[half:], guilty_of[:half]):
            if group:
                self._groups.appendleft(group)
        for sequence in guilty_of:
            sequence.is_suspect = True
        return None
