"""What the runner knows of a network: token ids in, logits of the wanted rows out.

Where K/V lies, and in which layout, is the network's own business: the runner names slots by
block and position only.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tokens of one step, gathered from the rows, sequence after sequence.

    T is padded up to a multiple of `Network.row_tile`; the padding lies behind the tokens of
    the last sequence, at position 0, and writes to no slot (slot -1).
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * P + offset, where the token's K/V goes
    block_tables: Tensor  # [S, blocks of the longest] int64
    query_starts: list[int]  # [S + 1] offsets into T, the padding not counted
    seq_lens: list[int]  # [S] tokens with K/V once the step is done
    device_query_starts: Tensor | None = None  # [S + 1] int32: the same on the device,
    device_seq_lens: Tensor | None = None  # [S] int32: where it is known better than on the host


class Network(Protocol):
    """A model and its K/V pool on one device."""

    @property
    def row_tile(self) -> int:
        """T of a step, and N of `compute_logits`, are multiples of this."""
        ...

    def forward(self, inputs: StepInputs) -> Tensor:
        """Write the step's K/V, return the last hidden states [T, hidden size]."""
        ...

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 logits [N, V] of some rows of hidden states, in `out` if that is given.

        They may be written over by the next call.
        """
        ...
