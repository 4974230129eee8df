"""The way in: one call that turns the logits of a step into token ids.

Puts the rows into groups, so that each pays for what it asks and no more: a greedy row without
masks, bias or penalties costs one maximum. Knows nothing of requests, K/V or stopping.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.sampling.distribution import draw
from model.sampling.edits import SampleRow, edit_logits
from model.sampling.logprobs import ChosenLogprobs, Score, chosen_logprobs, score_in_torch
from model.sampling.philox import uniforms
from model.sampling.ranking import first_max
from model.sampling.table import Draw, SampleRows, lines
from model.transfer import download, send, send_all, upload_ids


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


Choose = Callable[[Tensor, Sequence[SampleRow]], tuple[Tensor, Tensor]]
"""Choose an id for each row of logits, edits aside, and say whether the row had none to choose."""


def choose_in_torch(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
    """Return ids [N] of logits [N, V], and whether a row had none to choose [N]."""
    largest, token_ids = first_max(logits)
    sampling = [row.sampling for row in rows]
    if any(not s.is_greedy for s in sampling):
        seeds, choices = [s.seed for s in sampling], [s.choice for s in sampling]
        numbers = uniforms(seeds, choices, [row.position for row in rows])
        draw(token_ids, logits, largest, sampling, send(numbers, logits.device))
    return token_ids, _not_finite(largest)


def _not_finite(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(~np.isfinite(values.numpy()))  # four operations in torch
    return ~values.isfinite()


def choose_by(sample_rows: SampleRows) -> Choose:
    """Return what chooses with a kernel, for rows whose parameters are not on the device."""

    def choose(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
        sampling = [row.sampling for row in rows]
        positions = np.array([row.position for row in rows], dtype=np.int64)
        words, at, order = send_all(
            (lines(sampling).reshape(-1), positions, np.arange(len(rows))), logits.device
        )
        table = words.view(len(rows), -1)
        return sample_rows(logits, order, at, table, max(Draw.of(s) for s in sampling))

    return choose


def sample(
    logits: Tensor,
    rows: Sequence[SampleRow],
    choose: Choose = choose_in_torch,
    score: Score = score_in_torch,
) -> Sampled:
    """Choose a token from each row of logits [N, V] float32, which are not modified."""
    edited = [index for index, row in enumerate(rows) if row.edits_logits]
    if not edited:
        token_ids, is_broken = choose(logits, rows)
    else:
        token_ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        is_broken = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
        plain = [index for index, row in enumerate(rows) if not row.edits_logits]
        for way, indices in ((choose, plain), (_edited(choose), edited)):
            if indices:
                where = upload_ids(indices, logits.device)
                members = [rows[index] for index in indices]
                token_ids[where], is_broken[where] = way(logits[where], members)
    if logits.device.type != "cpu" or is_broken.numpy().any():
        token_ids = token_ids.masked_fill(is_broken, 0)
    logprobs = _logprobs(logits, token_ids, rows, score)
    return Sampled(token_ids=token_ids, is_broken=is_broken, logprobs=logprobs)


def _edited(choose: Choose) -> Choose:
    """Return what edits logits in place first; what an edit covers up is broken all the same."""

    def way(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, Tensor]:
        largest = logits.amax(-1)
        edit_logits(logits, rows)
        token_ids, is_broken = choose(logits, rows)
        return token_ids, is_broken | largest.isnan() | largest.isposinf()

    return way


def _logprobs(
    logits: Tensor, token_ids: Tensor, rows: Sequence[SampleRow], score: Score
) -> ChosenLogprobs | None:
    wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wanted:
        return None
    num_top = max(rows[index].sampling.logprobs or 0 for index in wanted)
    if len(wanted) == len(rows):
        return chosen_logprobs(logits, token_ids, num_top, score)
    where = upload_ids(wanted, logits.device)
    some = chosen_logprobs(logits[where], token_ids[where], num_top, score)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(rows), *values.shape[1:]).index_copy_(0, where, values)

    return ChosenLogprobs(
        logprobs=spread(some.logprobs),
        ranks=spread(some.ranks),
        top_ids=spread(some.top_ids),
        top_logprobs=spread(some.top_logprobs),
    )
