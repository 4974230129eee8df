"""What rows ask of a draw, as one tensor on the device: what a kernel reads without the host.

A line a row, written when a sequence becomes resident and never again, so that a step over the
same sequences sends nothing. Knows the parameters of a draw, not how ids are drawn.
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from model.step import SamplingParams
from model.transfer import Ids, send


class Draw(IntEnum):
    """What a row asks for at most; a row that asks for less comes out the same."""

    GREEDY = 0
    PLAIN = 1  # temperature and min_p
    FILTERED = 2  # top_k and top_p as well

    @classmethod
    def of(cls, sampling: SamplingParams) -> "Draw":
        if sampling.is_greedy:
            return cls.GREEDY
        return cls.FILTERED if sampling.top_k > 0 or sampling.top_p < 1.0 else cls.PLAIN


SampleRows = Callable[[Tensor, Tensor, Tensor, Tensor, Draw], tuple[Tensor, Tensor]]
"""Logits, rows, positions, table, the most -> ids and who is broken: model/kernels/sample.py."""

COLUMNS = 8
IS_RANDOM, SEED, CHOICE, TOP_K, TOP_P, SCALE, MIN_EXPONENT = range(7)
"""Columns; the last three hold the bits of a float64. A line of zeros is a greedy row."""


def lines(sampling: Sequence[SamplingParams]) -> Ids:
    """Return the lines [N, COLUMNS] of some rows."""
    words = np.zeros((len(sampling), COLUMNS), dtype=np.int64)
    numbers = words.view(np.float64)
    for line, s in enumerate(sampling):
        if s.is_greedy:
            continue
        words[line, IS_RANDOM] = 1
        words[line, SEED] = _as_signed(s.seed, 64)
        words[line, CHOICE] = s.choice
        words[line, TOP_K] = max(0, s.top_k)
        numbers[line, TOP_P] = s.top_p
        # The bounds keep 0 * inf out of the exponents, whatever the temperature.
        numbers[line, SCALE] = min(max(1.0 / s.temperature, 1e-37), 1e37)
        numbers[line, MIN_EXPONENT] = math.log(s.min_p) if s.min_p > 0 else -math.inf
    return words


class SamplingTable:
    """One line for each of `num_rows` rows and one more, which is nobody's and greedy."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.words = torch.zeros((num_rows + 1, COLUMNS), dtype=torch.int64, device=device)

    def write(self, rows: Sequence[int], sampling: Sequence[SamplingParams]) -> None:
        """Set the lines of some rows, in one copy that waits for nothing."""
        if not rows:
            return
        columns = np.column_stack((np.array(rows, dtype=np.int64), lines(sampling)))
        sent = send(torch.from_numpy(columns), self.words.device)
        self.words.index_copy_(0, sent[:, 0], sent[:, 1:])


def _as_signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
