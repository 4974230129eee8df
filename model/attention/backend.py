"""What the network asks of an attention back end, whatever it runs on."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from model.network import StepInputs

Attend = Callable[[int, Tensor], Tensor]
"""Given a layer and its fused product qkv [T, H + 2 K, D]: rotate queries and keys, write keys and
values, return the attention output [T, H * D]. What qkv held may be gone afterwards; rows of
padding in the output mean nothing."""


class AttentionBackend(Protocol):
    """Attention of a step's tokens to the keys of their sequences."""

    def plan(self, inputs: StepInputs) -> Attend:
        """Do once what all layers of a step share."""
        ...
