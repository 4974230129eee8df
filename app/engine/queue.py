"""Sequences that wait for a row: each tenant's in order, the tenant served least first."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from app.engine.fairness import FairShares
from app.engine.request import Sequence


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class WaitingQueue:
    """First come, first served within a tenant's priority; a preempted sequence keeps its place."""

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._of_tenant: dict[str, list[Sequence]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._of_tenant.values():
            yield from sequences

    def push(self, sequence: Sequence) -> None:
        insort(self._of_tenant.setdefault(sequence.request.tenant, []), sequence, key=_order)
        self._length += 1

    def peek(self) -> Sequence:
        """Return who is next; tenants served alike take turns by arrival."""
        heads = (sequences[0] for sequences in self._of_tenant.values())
        return min(heads, key=lambda s: (self._shares.counter(s.request.tenant), s.order))

    def remove(self, sequence: Sequence) -> None:
        sequences = self._of_tenant[sequence.request.tenant]
        place = bisect_left(sequences, sequence.order, key=_order)
        assert sequences[place] is sequence
        del sequences[place]
        self._length -= 1
        if not sequences:
            del self._of_tenant[sequence.request.tenant]
