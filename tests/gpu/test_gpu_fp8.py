"""fp8 and batch invariance on a card: needs torch, triton, numpy and pytest."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)
pytest.importorskip("triton")

from model.config import LoadOptions
from model.fp8 import FP8, Fp8Rows, quantize_rows
from model.graphs import CudaGraphRecorder
from model.kernels.fp8 import quantize_fp8
from model.kernels.matmul import invariant_linear, invariant_scaled_product
from model.layers.fp8 import (
    CAPABILITY,
    scaled_product,
    scaled_product_reference,
    why_no_scaled_product,
)
from model.loader import load_runner
from model.operations import TORCH, invariant_operations, triton_operations
from model.runner import ModelRunner
from model.step import SamplingParams
from tests.model.drive import load_network, logits_alone, make_limits
from tests.model.test_runner import logprobs, request, serve, tokens
from tests.toy import write_toy_checkpoint
from tests.toy_fp8 import FORMS, write_toy_fp8

DEVICE = torch.device("cuda")
SHAPES = [(1, 6144, 4096), (3, 4096, 14336), (64, 28672, 4096), (257, 576, 1536), (2048, 64, 64)]
"""Rows, outputs, inputs."""

needs_fp8 = pytest.mark.skipif(
    torch.cuda.get_device_capability() < CAPABILITY, reason="the card has no fp8 products"
)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)


@needs_fp8
def test_this_torch_has_the_product():
    assert why_no_scaled_product(DEVICE) is None


@needs_fp8
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_product_equals_its_reference(shape):
    num_rows, num_outputs, size = shape
    x = drawn(num_rows, size, seed=0) * torch.arange(1, num_rows + 1, device=DEVICE)[:, None]
    weight = drawn(num_outputs, size, seed=1)
    weight *= 1 + torch.arange(num_outputs, device=DEVICE)[:, None] % 5
    rows, weight_rows = quantize_fp8(x), quantize_fp8(weight)
    got = scaled_product(rows, weight_rows, torch.bfloat16)
    expected = scaled_product_reference(rows, weight_rows, torch.float32)
    error = (got.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Fast sums keep some 14 bits, bfloat16 eight.
    assert error.max() < 0.01
    invariant = invariant_scaled_product(rows, weight_rows, torch.float32)
    torch.testing.assert_close(invariant, expected, rtol=1e-4, atol=1e-3 * expected.abs().mean())


@needs_fp8
def test_kernel_quantizes_like_the_reference_to_the_bit():
    x = drawn(33, 14336, seed=2)
    got, expected = quantize_fp8(x), quantize_rows(x)
    assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(got.scales, expected.scales)


@pytest.mark.parametrize("num_rows", [2, 17, 64, 65, 300])
def test_row_of_an_invariant_product_is_the_same_in_any_company(num_rows):
    weight, x = drawn(6144, 4096, seed=3), drawn(num_rows, 4096, seed=4)
    whole = invariant_linear(x, weight)
    codes, weight_codes = quantize_fp8(x), quantize_fp8(weight)
    whole_fp8 = invariant_scaled_product(codes, weight_codes, torch.bfloat16)
    for at in {0, 1, num_rows // 2, num_rows - 1}:
        assert torch.equal(invariant_linear(x[at : at + 1], weight)[0], whole[at])
        one = Fp8Rows(codes.codes[at : at + 1], codes.scales[at : at + 1])
        got = invariant_scaled_product(one, weight_codes, torch.bfloat16)
        assert torch.equal(got[0], whole_fp8[at])


def random_prompts(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("is_fp8", [False, pytest.param(True, marks=needs_fp8)])
def test_batch_invariant_logprobs_are_bitwise_the_same_with_graphs_and_without(
    is_fp8, tmp_path, monkeypatch
):
    """Log-probabilities of every sampled token: alone, in a batch, launched and replayed."""
    monkeypatch.setattr("model.graphs.CAPTURE_SHARE", 1.0)  # a graph after every step
    folder = write_toy_checkpoint(tmp_path, dtype=torch.bfloat16)
    options = {"is_fp8": True, "kv_dtype": FP8} if is_fp8 else {}
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=20, logprobs=3)

    def serve_all(prompts: list[list[int]], has_graphs: bool) -> list[tuple[object, object]]:
        config, network = load_network(
            folder, torch.bfloat16, operations=invariant_operations(), device=DEVICE, **options
        )
        recorder = CudaGraphRecorder(DEVICE) if has_graphs else None
        runner = ModelRunner(
            network, make_limits(config, 16), DEVICE, decodes_on_device=True, recorder=recorder
        )
        runner.warm_up()
        requests = [request(str(at), prompt, sampling) for at, prompt in enumerate(prompts)]
        outputs, _ = serve(runner, requests, late=len(prompts) // 2)
        assert (runner.capture_all() > 0) == has_graphs
        answers = [outputs[str(at), 0] for at in range(len(prompts))]
        return [(tokens(answer), logprobs(answer)) for answer in answers]

    prompts = random_prompts(320, [37, 5, 120, 1, 64, 16, 17, 200, 3, 90, 8])
    batched = serve_all(prompts, has_graphs=False)
    assert serve_all(prompts, has_graphs=True) == batched
    for at in (0, 3, 7):
        assert serve_all(prompts[at : at + 1], has_graphs=False)[0] == batched[at]


@pytest.mark.parametrize("operations", [triton_operations, invariant_operations])
def test_fp8_keys_and_values_attend_like_the_reference(operations, tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    prompt = random_prompts(320, [150])[0]
    logits = []
    for each in (TORCH, operations()):
        config, network = load_network(folder, operations=each, device=DEVICE, kv_dtype=FP8)
        logits.append(logits_alone(config, network, prompt, DEVICE))
    expected, got = (each.log_softmax(-1) for each in logits)
    divergence = (expected.exp() * (expected - got)).sum(-1).mean()
    assert divergence < 0.01, "a key between two codes may go to either, no more"


@needs_fp8
@pytest.mark.parametrize("operations", [triton_operations, invariant_operations])
def test_network_in_fp8_is_near_its_reference(operations, tmp_path):
    folder = write_toy_checkpoint(tmp_path, dtype=torch.bfloat16)
    prompt = random_prompts(320, [100])[0]
    config, reference = load_network(folder, torch.bfloat16, is_fp8=True)
    expected = logits_alone(config, reference, prompt).log_softmax(-1)
    config, network = load_network(
        folder, torch.bfloat16, operations=operations(), device=DEVICE, is_fp8=True
    )
    got = logits_alone(config, network, prompt, DEVICE).cpu().log_softmax(-1)
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 0.1


@needs_fp8
@pytest.mark.parametrize("form", FORMS)
def test_fp8_checkpoint_is_served_with_graphs(form, tmp_path, monkeypatch):
    monkeypatch.setattr("model.graphs.CAPTURE_SHARE", 1.0)  # a graph after every step
    folder = write_toy_fp8(tmp_path, form)
    answers = []
    for flags in ({}, {"kv_cache_dtype": "fp8"}, {"batch_invariant": True}):
        info, runner = load_runner(
            LoadOptions(
                model=str(folder), device="cuda", kv_cache_memory_bytes=64 << 20, max_num_seqs=8,
                **flags,
            )
        )  # fmt: skip
        assert info.precision.quantization == "fp8"
        greedy = SamplingParams(temperature=0.0, max_tokens=8)
        prompts = random_prompts(320, [30, 9, 50])
        requests = [request(str(at), prompt, greedy) for at, prompt in enumerate(prompts)]
        outputs, _ = serve(runner, requests)
        assert runner.capture_all() > 0
        answers.append({key: len(tokens(each)) for key, each in outputs.items()})
    assert all(answer == {(str(at), 0): 8 for at in range(3)} for answer in answers)
