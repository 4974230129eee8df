"""Fair shares between tenants: who has been served least, by weight, goes first.

A virtual counter for each tenant grows by the tokens computed for it over its weight. One that
comes back after a pause begins at the lowest counter of those at work, so that idling saves
nothing up. Method: Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588).
"""

from collections.abc import Mapping


class FairShares:
    """Counters of the tenants that have work, and how many rows each holds."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._num_sequences: dict[str, int] = {}  # waiting or running
        self._num_rows: dict[str, int] = {}  # running

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    @property
    def counters(self) -> Mapping[str, float]:
        return self._counters

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    @property
    def rows(self) -> Mapping[str, int]:
        """How many rows each tenant holds that holds any."""
        return self._num_rows

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

    def take_row(self, tenant: str) -> None:
        self._num_rows[tenant] = self._num_rows.get(tenant, 0) + 1

    def give_row_back(self, tenant: str) -> None:
        self._num_rows[tenant] -= 1
        if not self._num_rows[tenant]:
            del self._num_rows[tenant]

    def serve(self, tenant: str, num_tokens: int) -> None:
        self._counters[tenant] += num_tokens / self.weight(tenant)

    def serve_each_row(self) -> None:
        """Count a step that computes one token for every row, as most do."""
        for tenant, num_rows in self._num_rows.items():
            self.serve(tenant, num_rows)

    @property
    def is_contended(self) -> bool:
        """Whether more than one tenant has work."""
        return len(self._num_sequences) > 1

    def rows_due(self, tenant: str, num_rows: int) -> int:
        """Return how many of the rows a tenant may have while others want some: at least one."""
        total = sum(self.weight(name) for name in self._num_sequences)
        return max(1, int(num_rows * self.weight(tenant) / total))

    def most_over(self, num_rows: int) -> str | None:
        """Return the tenant that holds the most rows above what it is due; None if nobody does."""
        held = self._num_rows.items()
        excess = {tenant: count - self.rows_due(tenant, num_rows) for tenant, count in held}
        if not excess:
            return None
        most = max(excess, key=lambda name: excess[name])
        return most if excess[most] > 0 else None
