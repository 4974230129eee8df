"""Compiles all kernels for some cards without one: a program that test_compile.py runs.

A driver that only claims to be a card makes Triton compile what a launch asks for; the launch
itself is left out. So what is compiled is what the functions that launch kernels ask for, with
their tiles, for the shapes of real models. Prints a JSON line a kernel and card.
"""

import json
import sys
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from model.attention.triton import TritonAttention
from model.config import ModelConfig, RopeConfig
from model.fp8 import quantize_rows
from model.kernels import activation, fp8, matmul, norm, places
from model.kernels.sample import sample_rows
from model.kernels.score import score
from model.kv_pool import KVPool
from model.layers.rotary import RotaryEmbedding
from model.network import StepInputs
from model.sampling.table import Draw, SamplingTable

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


class PretendedCard:
    """The part of a Triton driver that compilation asks."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


def attention(
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int = 16,
    is_invariant: bool = False,
) -> Callable[[], None]:
    """A mixed step: rotation and write, splits, both attention kernels, the merge."""

    def step() -> None:
        num_heads, num_kv_heads, head_dim = heads
        config = ModelConfig(
            vocab_size=16,
            hidden_size=64,
            intermediate_size=64,
            num_layers=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=1e-5,
            max_position_embeddings=256,
            rope=RopeConfig(),
            tie_word_embeddings=True,
        )
        pool = KVPool(config, num_blocks=2, block_size=block_size, dtype=kv_dtype, device=CPU)
        rotary = RotaryEmbedding(config, 256, CPU)
        zeros = torch.zeros(34, dtype=torch.int64)
        inputs = StepInputs(
            token_ids=zeros,
            positions=zeros,
            slots=zeros,
            block_tables=torch.zeros((2, 4), dtype=torch.int64),
            query_starts=[0, 1, 34],
            seq_lens=[1, 33],
        )
        backend = TritonAttention(config, pool, rotary, is_invariant)
        qkv = torch.zeros(34, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
        backend.plan(inputs)(0, qkv)

    return step


def elementwise(size: int, dtype: torch.dtype) -> Callable[[], None]:
    """Norms, activation and quantisation of a hidden size."""

    def step() -> None:
        x = torch.zeros(2, size, dtype=dtype)
        weight = torch.zeros(size, dtype=dtype)
        norm.add_rms_norm(None, x, weight, 1e-5)
        norm.add_rms_norm(x.clone(), x, weight, 1e-5)
        norm.add_rms_norm_fp8(x.clone(), x, weight, 1e-5)
        activation.silu_mul(torch.zeros(2, 2 * size, dtype=dtype))
        activation.silu_mul_fp8(torch.zeros(2, 2 * size, dtype=dtype))
        fp8.quantize_fp8(x)

    return step


def sampling(vocab_size: int) -> Callable[[], None]:
    """From logits to ids, with every filter."""

    def step() -> None:
        zeros = torch.zeros(2, dtype=torch.int64)
        table = SamplingTable(2, CPU).words
        sample_rows(torch.zeros(2, vocab_size), zeros, zeros, table, Draw.FILTERED)
        score(torch.zeros(2, vocab_size), zeros)

    return step


def product_in_fp8(num_outputs: int, size: int) -> Callable[[], None]:
    """The same in fp8."""

    def step() -> None:
        x, weight = (quantize_rows(torch.ones(rows, size)) for rows in (3, num_outputs))
        matmul.invariant_scaled_product(x, weight, BF16)

    return step


def product(num_outputs: int, size: int, dtype: torch.dtype) -> Callable[[], None]:
    """The product of fixed tiles, with and without a bias."""

    def step() -> None:
        x = torch.zeros(3, size, dtype=dtype)
        weight = torch.zeros(num_outputs, size, dtype=dtype)
        matmul.invariant_linear(x, weight)
        matmul.invariant_linear(x, weight, torch.zeros(num_outputs, dtype=dtype))

    return step


def looking_up(max_model_len: int) -> Callable[[], None]:
    """What a decode step begins with."""

    def step() -> None:
        zeros = torch.zeros(2, dtype=torch.int64)
        token_log = torch.zeros(3, max_model_len + 1, dtype=torch.int32)
        tables = torch.zeros(3, max_model_len // 16, dtype=torch.int32)
        places.look_up(zeros, zeros, token_log, tables, 16)

    return step


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEPS = {
    "1B": attention((32, 8, 64), BF16, BF16),
    "8B": attention((32, 8, 128), BF16, BF16),
    "8B, fp8 K/V": attention((32, 8, 128), BF16, FP8, block_size=64),
    "8B, invariant": attention((32, 8, 128), BF16, BF16, is_invariant=True),
    "1B, fp16, fp8 K/V": attention((32, 8, 64), FP16, FP8),
    "3B of another family": attention((32, 32, 80), FP16, FP16, block_size=32),
    "heads of 96": attention((24, 8, 96), BF16, BF16, block_size=128),
    "heads of 256": attention((8, 1, 256), BF16, BF16),
    "float32": attention((4, 2, 64), FP32, FP32),
    "float32, heads of 256": attention((4, 2, 256), FP32, FP32),
    "float32, invariant, heads of 256": attention((4, 2, 256), FP32, FP32, is_invariant=True),
    "sampling of 128256": sampling(128256),
    "sampling of 32000": sampling(32000),
    "invariant product": product(6144, 4096, BF16),
    "invariant product, float32": product(576, 576, FP32),
    "invariant product, fp8": product_in_fp8(4096, 14336),
    "looking up": looking_up(2048),
    "hidden 576": elementwise(576, BF16),
    "hidden 4096": elementwise(4096, BF16),
    "hidden 28672": elementwise(28672, FP16),
}


def compile_only(capability: int, name: str) -> Callable[..., object]:
    """Return what stands in for `kernel[grid]`: it compiles, reports, and launches nothing."""

    def choose_grid(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            record = {
                "capability": capability,
                "step": name,
                "kernel": kernel.__name__,
                "shared_bytes": compiled.metadata.shared,
                "cubin_bytes": len(compiled.asm["cubin"]),
            }
            sys.stdout.write(json.dumps(record) + "\n")

        return launch

    return choose_grid


def main(capability: int, names: list[str]) -> None:
    """Compile some steps for a card, all if none is named."""
    driver.set_active(PretendedCard(capability))
    fp8.converts_fp8 = lambda _device: capability >= 89
    for name in names or STEPS:
        JITFunction.__getitem__ = compile_only(capability, name)
        STEPS[name]()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
