"""Paged attention in Triton: picks the kernel for each sequence of a step.

A sequence with few new tokens (as many as fit beside each other into 16 rows of query heads:
one sampled token, some drafts) has its keys split among programs; one with more is cut into tiles
of queries. A token's attention so depends on its own sequence alone, whoever is in the batch.
The two differ in the order of sums; `is_invariant` makes all tokens take the second.

Nothing here waits for the device, and with `device_query_starts` and `device_seq_lens` in its
inputs nothing is sent there either: the host's lists then only say which kernels run and how large
their grids are. So a step can be captured in a CUDA graph from static tensors, see `plan`.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.attention.backend import Attend
from model.config import ModelConfig
from model.kernels import paged_decode, paged_prefill
from model.kernels.paged_decode import DecodeWork
from model.kernels.paged_prefill import PagedStep
from model.kernels.rotary import rope_write
from model.kv_pool import KVPool
from model.layers.rotary import RotaryEmbedding
from model.network import StepInputs
from model.transfer import upload

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A step's tensors on the device, and which kernels it needs."""

    positions: Tensor
    slots: Tensor
    step: PagedStep
    num_short: int  # the most new tokens of a sequence that has few; 0 if none has
    has_long: bool
    work: DecodeWork | None


class TritonAttention:
    """Grouped-query attention of a step's tokens over their sequences' K/V."""

    def __init__(
        self,
        config: ModelConfig,
        pool: KVPool,
        rotary: RotaryEmbedding,
        is_invariant: bool = False,
    ) -> None:
        self._pool = pool
        self._tables = rotary.half_tables()
        self._num_heads = config.num_heads
        self._head_dim = config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        self._is_invariant = is_invariant
        self._scale = LOG2_E / math.sqrt(config.head_dim)

    def plan(self, inputs: StepInputs) -> Attend:
        """Decide from the host's lists which kernels run, and number the splits of keys.

        For a CUDA graph of S sequences that have a token each, capture a forward pass over static
        tensors: token_ids, positions, slots [S]; block_tables [S, all blocks of a sequence];
        device_query_starts = arange(S + 1), device_seq_lens [S]; with query_starts =
        list(range(S + 1)), and seq_lens of any values, which are not looked at. Before a replay
        write the step's values into them; a row of padding has slot -1 and seq_len 0. What the
        graph allocates, `workspace_bytes` tells.
        """
        device = inputs.positions.device
        query_starts, seq_lens = inputs.device_query_starts, inputs.device_seq_lens
        if query_starts is None:
            query_starts = upload(inputs.query_starts, torch.int32, device)
        if seq_lens is None:
            seq_lens = upload(inputs.seq_lens, torch.int32, device)
        step = PagedStep(
            block_tables=inputs.block_tables,
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_size=self._pool.block_size,
        )
        counts = [end - start for start, end in pairwise(inputs.query_starts)]
        limit = self._most_short
        num_short = max((count for count in counts if count <= limit), default=0)
        work = None
        if num_short:
            work = paged_decode.plan_decode(step, num_short, self._num_heads, self._head_dim)
        plan = _Plan(
            positions=inputs.positions,
            slots=inputs.slots,
            step=step,
            num_short=num_short,
            has_long=any(count > limit for count in counts),
            work=work,
        )
        return partial(self._attend, plan)

    @property
    def _most_short(self) -> int:
        """New tokens that a sequence may have to get its keys split."""
        if self._is_invariant:
            return 0
        return paged_decode.choose_tiling(self._head_dim, self._group, 2).rows // self._group

    def _attend(self, plan: _Plan, layer: int, qkv: Tensor) -> Tensor:
        """Rotate, write, attend, in two to four launches."""
        pool = (self._pool.keys[layer], self._pool.values[layer])
        key_scale, value_scale = self._pool.key_scales[layer], self._pool.value_scales[layer]
        queries = rope_write(
            qkv, plan.positions, plan.slots, self._tables, pool, (key_scale, value_scale)
        )
        shape = (queries.shape[0], self._num_heads, self._head_dim)
        output = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
        sizes = (self._head_dim, self._group, qkv.dtype.itemsize)
        scale = self._scale * key_scale
        if plan.work is not None:
            paged_decode.paged_decode(
                queries,
                output,
                pool,
                plan.step,
                plan.work,
                tiling=paged_decode.choose_tiling(*sizes),
                scale=scale,
                value_scale=value_scale,
            )
        if plan.has_long:
            choose = (
                paged_prefill.invariant_tiling
                if self._is_invariant
                else paged_prefill.choose_tiling
            )
            paged_prefill.paged_prefill(
                queries,
                output,
                pool,
                plan.step,
                tiling=choose(*sizes),
                scale=scale,
                value_scale=value_scale,
                num_short=plan.num_short,
            )
        return output.flatten(1)


def workspace_bytes(config: ModelConfig, num_seqs: int, num_short: int = 1) -> int:
    """Return what a step allocates for partial results, once for all layers."""
    rows = num_seqs * num_short * config.num_heads * paged_decode.MAX_SPLITS
    return rows * (config.head_dim + 2) * 4
