"""From logits to one id: temperature, min_p, top_k, top_p and the inverse of the CDF.

Probabilities are integers here, in units of 2^-35 of the largest one. Integer sums come out
the same in whatever order they are taken, so no batch shape, thread split or device changes
them, and up to 2^18 ids they are exact in float64 as well. What is below one unit is never
drawn. Knows nothing of requests or log-probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.ranking import best
from model.step import SamplingParams
from model.transfer import upload, upload_ids

WEIGHT_BITS = 35
_SHORTLIST = 256  # candidates that are put in order before others are looked at
_BINS_PER_NAT = 1024


def weigh(logits: Tensor, largest: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the logarithm of each probability over the row's largest, and its weight in int64.

    `largest` [N, 1] is the row's largest logit, `scale` [N, 1] 1 / temperature. With `exp`, not
    `exp2`: torch's `exp2` rounds differently in the few elements that a vectorised loop leaves
    over, so that a weight would depend on where its row lies in the batch.
    """
    exponents = (logits - largest).mul_(scale)
    return exponents, torch.exp(exponents).mul_(float(1 << WEIGHT_BITS)).long()


def tile_len(logits: Tensor) -> int:
    """Return how many rows of logits [N, V] are best worked on at once.

    On a CPU the temporaries shall stay in its cache; elsewhere they shall only not be huge.
    """
    size = 1 << 18 if logits.device.type == "cpu" else 1 << 24
    return max(1, size // logits.shape[1])


def draw(
    token_ids: Tensor,
    logits: Tensor,
    largest: Tensor,
    sampling: Sequence[SamplingParams],
    uniforms: Tensor,
) -> None:
    """Overwrite the ids [N] of all rows that are not greedy by ids drawn from logits [N, V].

    `largest` [N] are the rows' largest logits, `uniforms` [N] float64 on the device. A row could
    be drawn in any of the ways below with the same result: they differ in speed alone. Rows
    without a finite largest logit get any valid id.
    """
    vocab_size = logits.shape[1]
    num_rows = tile_len(logits)
    whole: list[int] = []
    short: list[int] = []
    long: list[int] = []
    nucleus: list[int] = []
    for index, s in enumerate(sampling):
        if s.is_greedy:
            continue
        if 0 < s.top_k < vocab_size:
            (short if s.top_k <= _SHORTLIST else long).append(index)
        else:
            (nucleus if s.top_p < 1.0 else whole).append(index)
    for way, members in (
        (_draw_from_all, whole),
        (_draw_from_top_k, short),
        (_draw_from_top_k, long),
        (_draw_from_top_p, nucleus),
    ):
        for start in range(0, len(members), num_rows):
            tile = members[start : start + num_rows]
            where = upload_ids(tile, logits.device)
            filters = _Filters.of([sampling[i] for i in tile], uniforms[where], vocab_size)
            token_ids[where] = way(logits[where], largest[where, None], filters)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filters:
    """The parameters of some rows as columns on the device, and their uniforms."""

    scales: Tensor  # [N, 1] 1 / temperature
    min_exponents: Tensor  # [N, 1] log(min_p)
    top_ks: Tensor  # [N, 1] int64; V where off
    top_ps: Tensor  # [N, 1] float64
    uniforms: Tensor  # [N, 1] float64
    max_top_k: int
    has_min_p: bool

    @classmethod
    def of(
        cls, sampling: Sequence[SamplingParams], uniforms: Tensor, vocab_size: int
    ) -> "_Filters":
        # The bounds keep 0 * inf out of the exponents, whatever the temperature.
        scales = [min(max(1.0 / s.temperature, 1e-37), 1e37) for s in sampling]
        min_exponents = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in sampling]
        top_ks = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in sampling]
        top_ps = [s.top_p for s in sampling]
        device = uniforms.device
        return cls(
            scales=upload(scales, torch.float32, device)[:, None],
            min_exponents=upload(min_exponents, torch.float32, device)[:, None],
            top_ks=upload_ids(top_ks, device)[:, None],
            top_ps=upload(top_ps, torch.float64, device)[:, None],
            uniforms=uniforms[:, None],
            max_top_k=max(top_ks),
            has_min_p=any(s.min_p > 0 for s in sampling),
        )

    def weigh(self, logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `weigh` does, with no weight left below min_p."""
        exponents, weights = weigh(logits, largest, self.scales)
        if self.has_min_p:
            weights.masked_fill_(exponents < self.min_exponents, 0)
        return exponents, weights


def _draw_from_all(logits: Tensor, largest: Tensor, filters: _Filters) -> Tensor:
    _, weights = filters.weigh(logits, largest)
    return _invert(weights, filters.uniforms)[:, 0]


def _draw_from_top_k(logits: Tensor, largest: Tensor, filters: _Filters) -> Tensor:
    ids = best(logits, filters.max_top_k)
    _, weights = filters.weigh(logits.gather(1, ids), largest)
    weights.masked_fill_(torch.arange(ids.shape[1], device=ids.device) >= filters.top_ks, 0)
    target = _to_reach(weights.sum(-1, keepdim=True), filters.top_ps)
    return _pick(ids, _cut(weights, target), filters.uniforms)


def _draw_from_top_p(logits: Tensor, largest: Tensor, filters: _Filters) -> Tensor:
    """Draw from the smallest set of the best that reaches top_p.

    A short list of the best mostly reaches it. Whether it did must be known on the host; so
    that nothing waits for a device, anything but a CPU puts the whole vocabulary in order.
    """
    if logits.device.type != "cpu":
        return _draw_from_top_k(logits, largest, filters)
    exponents, weights = filters.weigh(logits, largest)
    target = _to_reach(weights.sum(-1, keepdim=True), filters.top_ps)
    ids = best(logits, min(_SHORTLIST, logits.shape[1]))
    listed = weights.gather(1, ids)
    drawn = _pick(ids, _cut(listed, target), filters.uniforms)
    is_short = listed.sum(-1, keepdim=True) < target
    for row in is_short[:, 0].nonzero()[:, 0].tolist():
        kept = _cut_by_bins(logits[row], exponents[row], weights[row], target[row])
        drawn[row] = _invert(kept[None], filters.uniforms[row, None])[0, 0]
    return drawn


def _cut_by_bins(logits: Tensor, exponents: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Do to one row [V] what `_cut` does, without putting it in order.

    The weights are summed up in bins of about the same probability. Bins before the one that
    reaches the target [1] are kept, those after it are not, and in it the order decides.
    """
    num_bins = 25 * _BINS_PER_NAT  # exp(-25) is less than one unit
    # Clamped as integers: NaN would go through a clamp of floats.
    bins = (exponents * -_BINS_PER_NAT).long().clamp_(0, num_bins - 1)
    in_bins = torch.zeros(num_bins, dtype=torch.int64).scatter_add_(0, bins, weights)
    reached = in_bins.cumsum(-1)
    last = torch.searchsorted(reached, target).clamp_(max=num_bins - 1)
    kept = weights.masked_fill(bins > last, 0)
    ids = (bins == last).nonzero()[:, 0]
    if len(ids):
        ids = ids[best(logits[None, ids], len(ids))[0]]
        before = reached[last] - in_bins[last]
        kept[ids] = _cut(weights[None, ids], target[None] - before)[0]
    return kept


def _to_reach(total: Tensor, top_ps: Tensor) -> Tensor:
    """Return the weight [N, 1] that the kept ids must reach; at least one is kept."""
    return (total * top_ps).round().long().clamp_(min=1)


def _cut(weights: Tensor, target: Tensor) -> Tensor:
    """Keep of weights [N, M] in order the first few that reach the target [N, 1]; 0 elsewhere."""
    return weights.masked_fill(weights.cumsum(-1) - weights >= target, 0)


def _pick(ids: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one of the ids [N, M], which come in any order, by rising id."""
    ids, order = ids.sort(-1)
    return ids.gather(1, _invert(weights.gather(1, order), uniforms))[:, 0]


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index [N, 1] at which the sum of the weights exceeds u of the total."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum((uniforms * total).long(), total - 1)
    return torch.searchsorted(sums, target, right=True).clamp_(max=weights.shape[1] - 1)
