"""Fair shares between tenants: who has been served least, by weight, goes first.

A virtual counter for each tenant grows by the tokens computed for it over its weight. One that
comes back after a pause begins at the lowest counter of those at work, so that idling saves
nothing up. Method: Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from collections.abc import Iterable, Mapping


class FairShares:
    """Counters of the tenants that have work. Knows neither queues nor rows."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._num_sequences: dict[str, int] = {}  # waiting or running

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def arrive(self, tenant: str) -> None:
        """Take note of a sequence of a tenant."""
        if tenant not in self._num_sequences:
            lowest = min((self._counters[name] for name in self._num_sequences), default=0.0)
            self._counters[tenant] = max(self.counter(tenant), lowest)
            self._num_sequences[tenant] = 0
        self._num_sequences[tenant] += 1

    def leave(self, tenant: str) -> None:
        """Take note of the end of a sequence; a tenant without any keeps no counter."""
        self._num_sequences[tenant] -= 1
        if not self._num_sequences[tenant]:
            del self._num_sequences[tenant], self._counters[tenant]

    def serve(self, tenant: str, num_tokens: int) -> None:
        self._counters[tenant] += num_tokens / self.weight(tenant)

    @property
    def is_contended(self) -> bool:
        """Whether more than one tenant has work."""
        return len(self._num_sequences) > 1

    def rows_due(self, tenant: str, num_rows: int) -> int:
        """Return how many of the rows a tenant may have while others want some: at least one."""
        total = sum(self.weight(name) for name in self._num_sequences)
        return max(1, int(num_rows * self.weight(tenant) / total))

    def most_over(self, running: Iterable[str], num_rows: int) -> str | None:
        """Return the tenant that holds the most rows above what it is due; None if nobody does."""
        held: dict[str, int] = {}
        for tenant in running:
            held[tenant] = held.get(tenant, 0) + 1
        excess = {tenant: count - self.rows_due(tenant, num_rows) for tenant, count in held.items()}
        if not excess:
            return None
        most = max(excess, key=lambda name: excess[name])
        return most if excess[most] > 0 else None
