"""Sequences that wait for a row, in the order in which they will get one."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from app.engine.request import Sequence


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class WaitingQueue:
    """First come, first served within a priority. A preempted sequence gets its old place back."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def push(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_order)

    def peek(self) -> Sequence:
        return self._sequences[0]

    def remove(self, sequence: Sequence) -> None:
        place = bisect_left(self._sequences, sequence.order, key=_order)
        assert self._sequences[place] is sequence
        del self._sequences[place]
