"""Log-probabilities of chosen tokens and of the best alternatives, from unmodified logits.

Knows nothing of how the tokens were chosen. Serves sampled tokens and prompts alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.distribution import WEIGHT_BITS, tile_len, weigh
from model.sampling.ranking import best
from model.step import TokenLogprobs
from model.transfer import download


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenLogprobs:
    """What is reported of N chosen tokens, each with the k most likely in falling order."""

    logprobs: Tensor  # [N] float32
    ranks: Tensor  # [N] int64; 1: the most likely
    top_ids: Tensor  # [N, k] int64
    top_logprobs: Tensor  # [N, k] float32

    def download(self) -> "ChosenLogprobs":
        """Return copies in host memory, there once the device has come this far."""
        return ChosenLogprobs(
            logprobs=download(self.logprobs),
            ranks=download(self.ranks),
            top_ids=download(self.top_ids),
            top_logprobs=download(self.top_logprobs),
        )


Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Logits and ids -> largest logits [N, 1], weight of all ids [N, 1], number of ids before [N]."""


def score_in_torch(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `Score` says of logits [N, V] and chosen ids [N]."""
    largest = logits.amax(-1, keepdim=True)
    _, weights = weigh(logits, largest, 1.0)
    columns = token_ids[:, None]
    chosen = logits.gather(1, columns)
    is_lower_id = torch.arange(logits.shape[1], device=logits.device) < columns
    is_before = (logits > chosen) | ((logits == chosen) & is_lower_id)
    return largest, weights.sum(-1, keepdim=True), torch.count_nonzero(is_before, dim=-1)


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int, score: Score = score_in_torch
) -> ChosenLogprobs:
    """Report the tokens [N] chosen from logits [N, V], with `num_top` alternatives (at most V).

    The logarithm of the softmax in float32. The rank counts greater logits, and equal ones of
    a lower id.
    """
    num_top = min(num_top, logits.shape[1])
    num_rows = tile_len(logits)
    tiles = [
        _report(logits[i : i + num_rows], token_ids[i : i + num_rows], num_top, score)
        for i in range(0, max(1, len(token_ids)), num_rows)
    ]
    return ChosenLogprobs(
        logprobs=torch.cat([tile.logprobs for tile in tiles]),
        ranks=torch.cat([tile.ranks for tile in tiles]),
        top_ids=torch.cat([tile.top_ids for tile in tiles]),
        top_logprobs=torch.cat([tile.top_logprobs for tile in tiles]),
    )


def to_token_logprobs(
    chosen: ChosenLogprobs, index: int, token_id: int, num_top: int
) -> TokenLogprobs:
    """Return one row of what `download` gave, with its first `num_top` alternatives."""
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(chosen.logprobs[index]),
        rank=int(chosen.ranks[index]),
        top_ids=tuple(chosen.top_ids[index, :num_top].tolist()),
        top_logprobs=tuple(chosen.top_logprobs[index, :num_top].tolist()),
    )


def _report(logits: Tensor, token_ids: Tensor, num_top: int, score: Score) -> ChosenLogprobs:
    largest, total, num_before = score(logits, token_ids)
    log_total = total.double().log() - WEIGHT_BITS * math.log(2)

    def logprobs(ids: Tensor) -> Tensor:
        return ((logits.gather(1, ids) - largest).double() - log_total).float()

    top_ids = best(logits, num_top) if num_top else token_ids.new_empty(len(logits), 0)
    return ChosenLogprobs(
        logprobs=logprobs(token_ids[:, None])[:, 0],
        ranks=1 + num_before,
        top_ids=top_ids,
        top_logprobs=logprobs(top_ids),
    )
