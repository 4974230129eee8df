"""The gated activation of a feed-forward part: SwiGLU (Shazeer, arXiv 2002.05202)."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [T, I] of gate and up side by side [T, 2 I].

    On a CPU, torch's own `silu` rounds differently in the vectorised body of a loop and in the
    few elements left over, so that a value's bits would depend on where it lies. `exp` is the
    same everywhere, and division and addition are exact to the last bit by definition.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.device.type != "cpu":
        return silu(gate) * up
    wide = gate.to(torch.float32)
    return wide.div(wide.neg().exp_().add_(1.0)).to(up.dtype) * up
