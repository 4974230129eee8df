"""Counter-based random numbers: Philox4x32-10 on int64 tensors, and one uniform a token.

Stateless, so a token's number depends on its seed, choice and position alone: not on the batch,
not on how often the sequence was preempted, not on the device. Knows nothing of logits.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Return ten rounds of Philox over counters [4, N] and keys [2, N] of 32-bit words in int64.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); Random123's
    `philox4x32-10`. The products wrap around in int64; the masks take the right bits out.
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device)[:, None]
    weyl = torch.tensor(_WEYL, device=counter.device)[:, None]
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        product = even * multipliers
        high, low = (product >> 32) & _WORD, product & _WORD
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + weyl) & _WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: list[int], choices: list[int], positions: list[int]) -> Tensor:
    """Return one number in [0, 1) a token, float64 [N] with 53 random bits, on the CPU.

    Layout: key = (seed low, seed high); counter = (position low, position high, choice, 0).
    The last counter word is free for other streams of the same token.
    """
    words = [
        [position & _WORD for position in positions],
        [position >> 32 for position in positions],
        [choice & _WORD for choice in choices],
        [0] * len(positions),
        [seed & _WORD for seed in seeds],
        [(seed >> 32) & _WORD for seed in seeds],
    ]
    block = torch.tensor(words)
    first, second, _, _ = philox4x32(block[:4], block[4:])
    bits: Tensor = (first >> 5) * (1 << 26) + (second >> 6)
    return bits.double() * 2.0**-53
