"""Draws for residents whose parameters lie on the device: nothing is built or sent a step.

For rows that want an id and nothing more. Masks, bias, penalties and log-probabilities go
through `sampler.sample`. Knows which row asks for what, not how ids are drawn.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from model.sampling.table import Draw, SampleRows, SamplingTable
from model.step import NewRow, PlanRow, SamplingParams


class ResidentDraws:
    """The table of a runner's rows, and the draws that read it.

    `sample_rows` waits for nothing and can be captured into a graph.
    """

    def __init__(self, num_rows: int, device: torch.device, sample_rows: SampleRows) -> None:
        self.table = SamplingTable(num_rows, device)
        self._sample_rows = sample_rows
        self._most: list[Draw | None] = [None] * num_rows  # None: wants more than an id

    def add(self, added: Sequence[NewRow]) -> None:
        """Note what new residents ask for; one copy, if there are any."""
        self.table.write([each.row for each in added], [each.sampling for each in added])
        for each in added:
            self._most[each.row] = Draw.of(each.sampling) if _is_plain(each.sampling) else None

    def warm_up(self, vocab_size: int) -> None:
        """Draw once with every filter, so that what is built at first use is built."""
        logits = torch.zeros((1, vocab_size), device=self.table.words.device)
        row = torch.zeros(1, dtype=torch.int64, device=logits.device)
        self._sample_rows(logits, row, row, self.table.words, Draw.FILTERED)

    def most(self, plan_rows: Iterable[PlanRow]) -> Draw | None:
        """Return what the rows that sample ask for; None if one wants more than an id."""
        most = Draw.GREEDY
        for each in plan_rows:
            if not each.sample:
                continue
            own = self._most[each.row]
            if own is None or each.mask_slot is not None:
                return None
            most = max(most, own)
        return most

    def draw(
        self, logits: Tensor, rows: Tensor, positions: Tensor, most: Draw
    ) -> tuple[Tensor, Tensor]:
        """Draw an id from each of logits [N, V]; return ids and who is broken, both [N]."""
        return self._sample_rows(logits, rows, positions, self.table.words, most)


def _is_plain(s: SamplingParams) -> bool:
    penalties = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    return (
        s.allowed_token_ids is None
        and not s.bad_words_token_ids
        and not s.logit_bias
        and not (s.min_tokens and s.stop_token_ids)
        and penalties == (1.0, 0.0, 0.0)
        and s.logprobs is None
    )
