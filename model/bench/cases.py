"""The kernels of a model's step at the sizes they are called with, with what each must move and do.

A case makes its inputs afresh with every call of `make`; sizes are those of one layer.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.bench.card import fp8_product, has_fp8
from model.bench.timing import Call
from model.config import ModelConfig
from model.operations import Operations
from model.sampling.edits import SampleRow
from model.sampling.sampler import sample
from model.step import SamplingParams

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one size. `is_captured` unless the host takes part in each call."""

    name: str
    size: str
    make: Callable[[], Call]
    num_bytes: float
    flops: float = 0.0
    is_fp8: bool = False
    is_captured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the cases are made for: numbers of tokens, batches and their contexts, prompts."""

    tokens: tuple[int, ...] = (1, 32, 256, 2048)
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (768, 4096)
    prompts: tuple[int, ...] = (512, 2048, 8192)


def cases_of(
    config: ModelConfig, operations: Operations, sizes: Sizes, device: torch.device
) -> Iterator[Case]:
    """Yield what can be run here: attention and fp8 need Triton or a card that has them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = Draw(config, dtype, device)
    for num_tokens in sizes.tokens:
        yield from _products(draw, num_tokens)
    for num_tokens in sizes.tokens:
        yield from _elementwise(draw, operations, num_tokens)
    if operations.name == "triton":
        yield from triton_cases(draw, sizes)
    for batch in sizes.batches:
        yield from _sampling(draw, batch)


class Draw:
    """Draws inputs of a model's sizes on a device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.itemsize = dtype.itemsize

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def integers(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _products(draw: Draw, num_tokens: int) -> Iterator[Case]:
    """The layer's widest product, and in fp8 where the card has that; through cuBLAS."""
    inner, outer = draw.config.hidden_size, 2 * draw.config.intermediate_size
    flops = 2.0 * num_tokens * inner * outer

    def make() -> Call:
        x, weight = draw.normal(num_tokens, inner), draw.normal(outer, inner)
        return lambda: linear(x, weight)

    moved = num_tokens * (inner + outer) + inner * outer
    size = f"{num_tokens} tokens"
    yield Case(
        name="gate_up product", size=size, make=make, num_bytes=moved * draw.itemsize, flops=flops
    )
    if has_fp8(draw.device):
        num_bytes = num_tokens * (inner + 2 * outer) + inner * outer
        yield Case(
            name="gate_up product fp8", size=size, num_bytes=num_bytes, flops=flops, is_fp8=True,
            make=partial(fp8_product, num_tokens, outer, inner, draw.device),
        )  # fmt: skip


def _elementwise(draw: Draw, operations: Operations, num_tokens: int) -> Iterator[Case]:
    hidden, inner = draw.config.hidden_size, draw.config.intermediate_size
    size = f"{num_tokens} tokens"

    def make_norm() -> Call:
        delta, residual = (draw.normal(num_tokens, hidden) for _ in range(2))
        weight = draw.normal(hidden)
        return lambda: operations.add_rms_norm(delta, residual, weight, 1e-5)

    def make_swiglu() -> Call:
        gate_up = draw.normal(num_tokens, 2 * inner)
        return lambda: operations.swiglu(gate_up)

    norm_bytes = (4 * num_tokens + 1) * hidden * draw.itemsize
    yield Case(name="add_rms_norm", size=size, make=make_norm, num_bytes=norm_bytes)
    swiglu_bytes = 3 * num_tokens * inner * draw.itemsize
    yield Case(name="silu_mul", size=size, make=make_swiglu, num_bytes=swiglu_bytes)


def triton_cases(draw: Draw, sizes: Sizes) -> Iterator[Case]:
    """Yield the cases of what only Triton computes. Raises ImportError without triton."""
    for num_tokens in sizes.tokens:
        yield _quantize(draw, num_tokens)
        yield _rope_write(draw, num_tokens)
    for context in sizes.contexts:
        for batch in sizes.batches:
            yield _paged_decode(draw, batch, context, draw.dtype)
    if has_fp8(draw.device):
        for batch in sizes.batches:
            yield _paged_decode(draw, batch, sizes.contexts[0], torch.float8_e4m3fn)
    for num_tokens in sizes.prompts:
        yield _paged_prefill(draw, num_tokens)


def _quantize(draw: Draw, num_tokens: int) -> Case:
    from model.kernels.fp8 import quantize_fp8

    def make() -> Call:
        x = draw.normal(num_tokens, draw.config.intermediate_size)
        return lambda: quantize_fp8(x)

    num_bytes = num_tokens * (draw.config.intermediate_size * (draw.itemsize + 1) + 4)
    return Case(name="quantize_fp8", size=f"{num_tokens} tokens", make=make, num_bytes=num_bytes)


def _rope_write(draw: Draw, num_tokens: int) -> Case:
    from model.kernels.rotary import rope_write

    config = draw.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    num_slots = 4 * num_tokens + BLOCK_SIZE

    def make() -> Call:
        qkv = draw.normal(num_tokens, heads + 2 * kv_heads, dim)
        pool = (draw.normal(kv_heads, num_slots, dim), draw.normal(kv_heads, num_slots, dim))
        angles = [draw.normal(4096, dim // 2, dtype=torch.float32) for _ in range(2)]
        order = torch.randperm(num_slots)[:num_tokens].tolist()
        slots = draw.integers(order, torch.int64)
        positions = slots % 4096
        return lambda: rope_write(qkv, positions, slots, (angles[0], angles[1]), pool)

    # Queries are read and written, keys and values read and written elsewhere.
    moved = num_tokens * (2 * heads + 4 * kv_heads) * dim * draw.itemsize
    return Case(
        name="rope_write", size=f"{num_tokens} tokens", make=make,
        num_bytes=moved + num_tokens * (8 * dim // 2 + 16),
    )  # fmt: skip


def _paged_decode(draw: Draw, batch: int, context: int, kv_dtype: torch.dtype) -> Case:
    from model.kernels import paged_decode
    from model.kernels.paged_prefill import PagedStep

    config = draw.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    num_blocks = -(-context // BLOCK_SIZE)

    def make() -> Call:
        pool = _pool(draw, batch * num_blocks, kv_dtype)
        queries = draw.normal(batch, heads, dim)
        output = torch.empty_like(queries)
        step = PagedStep(
            block_tables=_tables(draw, batch, num_blocks),
            query_starts=draw.integers(list(range(batch + 1)), torch.int32),
            seq_lens=draw.integers([context] * batch, torch.int32),
            block_size=BLOCK_SIZE,
        )
        tiling = paged_decode.choose_tiling(dim, heads // kv_heads, draw.itemsize)
        work = paged_decode.plan_decode(step, 1, heads, dim)
        scale = math.log2(math.e) / math.sqrt(dim)
        return lambda: paged_decode.paged_decode(
            queries, output, pool, step, work, tiling=tiling, scale=scale
        )

    keys_and_values = 2 * batch * context * kv_heads * dim * kv_dtype.itemsize
    kind = " fp8" if kv_dtype is torch.float8_e4m3fn else ""
    return Case(
        name=f"paged decode{kind}",
        size=f"{batch} × {context}",
        make=make,
        num_bytes=keys_and_values + 2 * batch * heads * dim * draw.itemsize,
        flops=4.0 * batch * context * heads * dim,
    )


def _paged_prefill(draw: Draw, num_tokens: int) -> Case:
    from model.kernels import paged_prefill
    from model.kernels.paged_prefill import PagedStep

    config = draw.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    num_blocks = -(-num_tokens // BLOCK_SIZE)

    def make() -> Call:
        pool = _pool(draw, num_blocks, draw.dtype)
        queries = draw.normal(num_tokens, heads, dim)
        output = torch.empty_like(queries)
        step = PagedStep(
            block_tables=_tables(draw, 1, num_blocks),
            query_starts=draw.integers([0, num_tokens], torch.int32),
            seq_lens=draw.integers([num_tokens], torch.int32),
            block_size=BLOCK_SIZE,
        )
        tiling = paged_prefill.choose_tiling(dim, heads // kv_heads, draw.itemsize)
        scale = math.log2(math.e) / math.sqrt(dim)
        return lambda: paged_prefill.paged_prefill(
            queries, output, pool, step, tiling=tiling, scale=scale
        )

    return Case(
        name="paged prefill",
        size=f"{num_tokens} tokens",
        make=make,
        num_bytes=num_tokens * (2 * heads + 2 * kv_heads) * dim * draw.itemsize,
        flops=4.0 * heads * dim * num_tokens * (num_tokens + 1) / 2,
    )


def _pool(draw: Draw, num_blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (draw.config.num_kv_heads, num_blocks * BLOCK_SIZE + 2, draw.config.head_dim)
    keys, values = (draw.normal(*shape).to(dtype) for _ in range(2))
    return keys, values


def _tables(draw: Draw, batch: int, num_blocks: int) -> Tensor:
    """Return tables [S, blocks] over blocks in no order, as they come to lie in a used pool."""
    order = torch.randperm(batch * num_blocks, device=draw.device)
    return order.view(batch, num_blocks).to(torch.int32)


def _sampling(draw: Draw, batch: int) -> Iterator[Case]:
    """Sampling as a step does it; its least is to read the logits once."""
    vocab_size = draw.config.vocab_size
    ways = {
        "sampling, greedy": SamplingParams(temperature=0.0),
        "sampling, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
        "sampling, temperature": SamplingParams(temperature=0.8, seed=1),
    }
    for name, sampling in ways.items():

        def make(sampling: SamplingParams = sampling) -> Call:
            logits = draw.normal(batch, vocab_size, dtype=torch.float32) * 3
            no_log = torch.empty(0, dtype=torch.int32, device=draw.device)
            rows = [
                SampleRow(sampling=sampling, position=600 + row, num_prompt_tokens=512,
                          token_log=no_log)
                for row in range(batch)
            ]  # fmt: skip
            return lambda: sample(logits, rows)

        yield Case(
            name=name,
            size=f"batch {batch}",
            make=make,
            num_bytes=4 * batch * vocab_size,
            is_captured=False,
        )
