"""What fp8 costs on real text, with the sums of a card's products taken in float32 on a CPU.

Three bits of mantissa on both sides of a product show in a model of 135 million parameters: the
bounds tell a fault from that, they are no promise.
"""

import pytest
import torch

from model.kv_pool import KVPool
from model.llama import LlamaNetwork
from model.operations import TORCH
from model.precision import is_in_fp8
from tests.model.cpu.test_quality import WINDOW, compare, demo, one_sequence, windows

__all__ = ["demo"]  # the fixture

CPU = torch.device("cpu")


def logprobs(
    checkpoint, texts: list[list[int]], *, dtype: torch.dtype, is_fp8: bool, kv_dtype: torch.dtype
) -> list[torch.Tensor]:
    pool = KVPool(
        checkpoint.config, num_blocks=WINDOW // 16, block_size=16, dtype=kv_dtype, device=CPU
    )

    def read_fp8(name):
        if not is_fp8 or not is_in_fp8(checkpoint, name):
            return None
        return TORCH.fp8.quantize(checkpoint.read(name))

    def read(name):
        return checkpoint.read(name).to(dtype).contiguous()

    found = []
    with torch.inference_mode():
        network = LlamaNetwork(checkpoint.config, read, pool, WINDOW, read_fp8=read_fp8)
        for token_ids in texts:
            hidden = network.forward(one_sequence(token_ids))
            found.append(network.compute_logits(hidden).log_softmax(-1))
    return found


@pytest.mark.demo
def test_fp8_keeps_perplexity_within_a_few_percent(demo, full):
    texts = windows(demo, 6 if full else 1)
    wide = torch.float32
    exact = logprobs(demo, texts, dtype=wide, is_fp8=False, kv_dtype=wide)
    for what, is_fp8, kv_dtype in (
        ("bfloat16", False, torch.bfloat16),
        ("fp8, bfloat16 K/V", True, torch.bfloat16),
        ("fp8, fp8 K/V", True, torch.float8_e4m3fn),
    ):
        found = logprobs(demo, texts, dtype=torch.bfloat16, is_fp8=is_fp8, kv_dtype=kv_dtype)
        ratio, divergence, report = compare(what, exact, found, texts)
        assert ratio < 1.05, report
        assert divergence <= 0.06, report
