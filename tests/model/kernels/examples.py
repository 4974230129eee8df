"""Random small problems for the attention kernels: ragged batches over a shuffled pool."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.paged_prefill import PagedStep

LOG2_E = math.log2(math.e)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of an attention output whose values are about 1: some units in the last place of the dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sequences with some new tokens each; the pool holds all their keys and values."""

    queries: Tensor  # [T, H, D]
    keys: Tensor  # [K, slots, D]
    values: Tensor
    step: PagedStep
    counts: list[int]
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def scale(self) -> float:
        return LOG2_E / math.sqrt(self.queries.shape[2]) * self.key_scale

    def reference(self) -> Tensor:
        """Attention [T, H, D] in float64, one sequence and head after the other."""
        output = torch.zeros(self.queries.shape, dtype=torch.float64)
        group = self.queries.shape[1] // self.keys.shape[0]
        starts = self.step.query_starts.tolist()
        for sequence, seq_len in enumerate(self.step.seq_lens.tolist()):
            start, end = starts[sequence], starts[sequence + 1]
            if start == end or not seq_len:
                continue
            places = torch.arange(seq_len)
            size = self.step.block_size
            table = self.step.block_tables[sequence].cpu().to(torch.int64)
            slots = table[places // size] * size + places % size
            hidden = (
                places[None, :] > (seq_len - (end - start) + torch.arange(end - start))[:, None]
            )
            for head in range(self.queries.shape[1]):
                keys = self.keys.cpu()[head // group].to(torch.float64)[slots] * self.key_scale
                values = self.values.cpu()[head // group].to(torch.float64)[slots]
                queries = self.queries.cpu()[start:end, head].to(torch.float64)
                scores = queries @ keys.T / math.sqrt(keys.shape[1])
                weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
                output[start:end, head] = weights @ (values * self.value_scale)
        return output


def draw_problem(
    rng: random.Random,
    device: torch.device,
    *,
    lengths: list[tuple[int, int]],  # of each sequence: new tokens, tokens in all
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    table_dtype: torch.dtype = torch.int64,
) -> Problem:
    """Draw one; slots that belong to nobody hold NaN, so that reading one shows."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    counts = [count for count, _ in lengths]
    num_blocks = [-(-seq_len // block_size) for _, seq_len in lengths]
    blocks = list(range(sum(num_blocks) + 3))
    rng.shuffle(blocks)
    tables = torch.full((len(lengths), max(num_blocks) + 1), 10**6, dtype=table_dtype)
    shape = (num_kv_heads, len(blocks) * block_size + 2, head_dim)
    keys, values = (torch.full(shape, math.nan) for _ in range(2))
    for row, (_, seq_len) in enumerate(lengths):
        own = torch.tensor([blocks.pop() for _ in range(num_blocks[row])], dtype=torch.int64)
        tables[row, : len(own)] = own.to(table_dtype)
        places = torch.arange(seq_len)
        slots = own[places // block_size] * block_size + places % block_size
        for pool in (keys, values):
            pool[:, slots] = torch.randn(num_kv_heads, seq_len, head_dim, generator=generator)
    scales = (1.0, 1.0)
    kv_dtype = kv_dtype or dtype
    if kv_dtype is torch.float8_e4m3fn:
        scales = (0.05, 0.02)
        keys, values = keys / scales[0], values / scales[1]
    queries = torch.randn(sum(counts), num_kv_heads * group, head_dim, generator=generator)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return Problem(
        queries=queries.to(dtype).to(device),
        keys=keys.to(kv_dtype).to(device),
        values=values.to(kv_dtype).to(device),
        step=PagedStep(
            block_tables=tables.to(device),
            query_starts=torch.tensor(starts, dtype=torch.int32).to(device),
            seq_lens=torch.tensor([n for _, n in lengths], dtype=torch.int32).to(device),
            block_size=block_size,
        ),
        counts=counts,
        key_scale=scales[0],
        value_scale=scales[1],
    )
