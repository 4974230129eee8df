"""Counter-based random numbers: Philox4x32-10, and one uniform a token.

Stateless, so a token's number depends on its seed, choice and position alone: not on the batch,
not on how often the sequence was preempted. Integers on the host, hence the same for every
device; a few small arrays cost less there than anywhere else. Knows nothing of logits.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
"""32-bit words, each in 64 bits so that products fit."""

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Words, key: Words) -> Words:
    """Return ten rounds of Philox [4, N] over counters [4, N] and keys [2, N].

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); Random123's
    `philox4x32-10`.
    """
    mask, half = np.uint64(_WORD), np.uint64(32)
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64)[:, None]
    weyl = np.array(_WEYL, dtype=np.uint64)[:, None]
    rounds = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None]
    even, odd = counter[0::2], counter[1::2]
    for round_key in (key + rounds * weyl) & mask:
        product = even * multipliers
        even = (product >> half)[::-1] ^ odd ^ round_key
        odd = (product & mask)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Return one number in [0, 1) a token, float64 [N] with 53 random bits, on the CPU.

    Layout: key = (seed low, seed high); counter = (position low, position high, choice, 0).
    The last counter word is free for other streams of the same token.
    """
    counter = [
        [position & _WORD for position in positions],
        [position >> 32 for position in positions],
        [choice & _WORD for choice in choices],
        [0] * len(positions),
    ]
    key = [[seed & _WORD for seed in seeds], [(seed >> 32) & _WORD for seed in seeds]]
    words = philox4x32(np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64))
    bits = ((words[0] >> 5) << 26) + (words[1] >> 6)
    return torch.from_numpy(bits * 2.0**-53)
