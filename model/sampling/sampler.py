"""The way in: one call that turns the logits of a step into token ids.

Puts the rows into groups, so that each pays for what it asks and no more: a greedy row without
masks, bias or penalties costs one maximum. Knows nothing of requests, K/V or stopping.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.distribution import draw
from model.sampling.edits import SampleRow, edit_logits
from model.sampling.logprobs import ChosenLogprobs, chosen_logprobs
from model.sampling.philox import uniforms
from model.sampling.ranking import first_max
from model.transfer import download, send, upload_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The tokens of N rows, on the device; nothing has waited for it."""

    token_ids: Tensor  # [N] int64
    is_broken: Tensor  # [N] bool: NaN or +inf in the logits, or no id allowed; its token is 0
    logprobs: ChosenLogprobs | None  # of all rows, if any asks; 0 in those that do not

    def download(self) -> "Sampled":
        """Return copies in host memory, there once the device has come this far."""
        return Sampled(
            token_ids=download(self.token_ids),
            is_broken=download(self.is_broken),
            logprobs=None if self.logprobs is None else self.logprobs.download(),
        )


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose a token from each row of logits [N, V] float32, which are not modified."""
    is_random = any(not row.sampling.is_greedy for row in rows)
    numbers = _uniforms(rows, logits.device) if is_random else None
    edited = [index for index, row in enumerate(rows) if row.edits_logits]
    if not edited:
        token_ids, is_broken = _choose(logits, rows, numbers)
    else:
        token_ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        is_broken = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
        plain = [index for index, row in enumerate(rows) if not row.edits_logits]
        for way, indices in ((_choose, plain), (_choose_edited, edited)):
            if indices:
                where = upload_ids(indices, logits.device)
                members = [rows[index] for index in indices]
                some = None if numbers is None else numbers[where]
                token_ids[where], is_broken[where] = way(logits[where], members, some)
    token_ids = token_ids.masked_fill(is_broken, 0)
    return Sampled(
        token_ids=token_ids, is_broken=is_broken, logprobs=_logprobs(logits, token_ids, rows)
    )


def _uniforms(rows: Sequence[SampleRow], device: torch.device) -> Tensor:
    seeds = [row.sampling.seed for row in rows]
    choices = [row.sampling.choice for row in rows]
    numbers = uniforms(seeds, choices, [row.position for row in rows])
    return send(numbers, device)


def _choose(
    logits: Tensor, rows: Sequence[SampleRow], numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return an id for each row, and whether the row had none to choose."""
    largest, token_ids = first_max(logits)
    if numbers is not None:
        draw(token_ids, logits, largest, [row.sampling for row in rows], numbers)
    return token_ids, ~largest.isfinite()


def _choose_edited(
    logits: Tensor, rows: Sequence[SampleRow], numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Edit the logits in place and choose; what an edit covers up is broken all the same."""
    largest = logits.amax(-1)
    edit_logits(logits, rows)
    token_ids, is_broken = _choose(logits, rows, numbers)
    return token_ids, is_broken | largest.isnan() | largest.isposinf()


def _logprobs(
    logits: Tensor, token_ids: Tensor, rows: Sequence[SampleRow]
) -> ChosenLogprobs | None:
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return None
    num_top = max(rows[index].sampling.logprobs or 0 for index in wanted)
    if len(wanted) == len(rows):
        return chosen_logprobs(logits, token_ids, num_top)
    where = upload_ids(wanted, logits.device)
    some = chosen_logprobs(logits[where], token_ids[where], num_top)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(rows), *values.shape[1:]).index_copy_(0, where, values)

    return ChosenLogprobs(
        logprobs=spread(some.logprobs),
        ranks=spread(some.ranks),
        top_ids=spread(some.top_ids),
        top_logprobs=spread(some.top_logprobs),
    )
