"""Norm, activation and fp8 kernels against their torch references.

float32 differs by the order of sums and by the last place of exp and rsqrt; in float16 such a
difference can round the other way, hence two units in the last place. On a card bfloat16 is the
same; the interpreter truncates where a card rounds to nearest, hence three.
"""

import random

import pytest
import torch
import triton
import triton.language as tl

from model.fp8 import quantize_rows
from model.kernels.activation import silu_mul, silu_mul_fp8
from model.kernels.fp8 import (
    decode_e4m3,
    encode_e4m3,
    quantize_fp8,
)
from model.kernels.norm import add_rms_norm, add_rms_norm_fp8
from model.layers import norm
from model.layers.activation import swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2.4e-2}


def shapes(seed: int, count: int = 12) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, 5), rng.choice([16, 40, 64, 100, 576, 1030])) for _ in range(count)]


def assert_close(got, expected):
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_codes_close(codes, scales, expected):
    """fp8 of nearly equal numbers: a code differs by one at most, that is 1/8 of its value."""
    expected_codes, expected_scales = expected
    torch.testing.assert_close(scales, expected_scales, rtol=1e-2, atol=0)
    got, wanted = codes.to(torch.float32), expected_codes.to(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=0.13, atol=2**-9)
    assert (got != wanted).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_equals_the_layer(dtype, device, generator):
    for num_rows, size in shapes(1):
        delta, residual = (torch.randn(num_rows, size, generator=generator) for _ in range(2))
        weight = 1 + 0.2 * torch.randn(size, generator=generator)
        delta, residual, weight = (x.to(dtype).to(device) for x in (delta, residual, weight))
        expected_stream = residual.clone()
        expected = norm.add_rms_norm(delta, expected_stream, weight, 1e-5)
        got = add_rms_norm(delta, residual, weight, 1e-5)
        assert_close(residual, expected_stream)
        assert torch.equal(residual, expected_stream) or dtype is torch.bfloat16
        assert_close(got, expected)


def test_norm_without_delta_leaves_the_stream_alone(device, generator):
    residual = torch.randn(3, 48, generator=generator).to(device)
    before, weight = residual.clone(), torch.ones(48, device=device)
    got = add_rms_norm(None, residual, weight, 1e-5)
    assert torch.equal(residual, before)
    assert_close(got, norm.add_rms_norm(None, before, weight, 1e-5))


def test_add_rms_norm_can_quantize_on_its_way(device, generator):
    for num_rows, size in shapes(2, 6):
        delta, residual = (
            torch.randn(num_rows, size, generator=generator).to(torch.float16).to(device)
            for _ in range(2)
        )
        weight = torch.ones(size, dtype=torch.float16, device=device)
        expected = norm.add_rms_norm(delta, residual.clone(), weight, 1e-5)
        got = add_rms_norm_fp8(delta, residual, weight, 1e-5)
        assert_codes_close(*got, quantize_rows(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_equals_the_layer(dtype, device, generator):
    for num_rows, size in shapes(3):
        gate_up = (3 * torch.randn(num_rows, 2 * size, generator=generator)).to(dtype).to(device)
        assert_close(silu_mul(gate_up), swiglu(gate_up))


def test_silu_of_large_numbers_is_no_nan(device):
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, -88.0, 1.0, 1.0, 1.0, 1.0]]).to(device)
    torch.testing.assert_close(silu_mul(gate_up), swiglu(gate_up))


def test_silu_mul_can_quantize_on_its_way(device, generator):
    for num_rows, size in shapes(4, 6):
        gate_up = torch.randn(num_rows, 2 * size, generator=generator).to(torch.float16).to(device)
        assert_codes_close(*silu_mul_fp8(gate_up), quantize_rows(swiglu(gate_up)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_fp8_equals_its_reference_to_the_bit(dtype, device, generator):
    for num_rows, size in shapes(5):
        x = (
            torch.randn(num_rows, size, generator=generator)
            * 10.0 ** torch.arange(num_rows)[:, None]
        )
        x[0] = 0.0
        x = x.to(dtype).to(device)
        codes, scales = quantize_fp8(x)
        expected_codes, expected_scales = quantize_rows(x)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


def test_quantized_values_come_back_within_a_sixteenth(device, generator):
    x = torch.randn(4, 200, generator=generator).to(device)
    codes, scales = quantize_fp8(x)
    error = (codes.to(torch.float32) * scales - x).abs()
    assert (error <= x.abs() / 16 + scales * 2**-9).all()


@triton.jit
def _recode(x_ptr, codes_ptr, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < size, other=0.0)
    tl.store(codes_ptr + places, encode_e4m3(x), mask=places < size)


@triton.jit
def _decode(codes_ptr, x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(x_ptr + places, decode_e4m3(tl.load(codes_ptr + places)).to(tl.float32))


def test_integer_codec_rounds_like_torch(device):
    values = torch.arange(0, 2**32, 104729, dtype=torch.int64).to(torch.int32).view(torch.float32)
    halves = torch.arange(0x80, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    halves = halves[:0x7F]
    ties = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([values, halves, ties, -ties, torch.tensor([448.0, 464.0, 1e9, -1e9])])
    values = values[: len(values) // 16 * 16].reshape(-1, 16)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=device)
    _recode[(1,)](values.to(device), codes, values.numel(), BLOCK=1 << 16)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes.cpu(), expected)


def test_integer_codec_reads_all_codes(device):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = torch.empty(256, device=device)
    _decode[(1,)](codes.to(device), values, BLOCK=256)
    expected = codes.view(torch.float8_e4m3fn).to(torch.float32)
    is_nan = expected.isnan()
    assert torch.equal(values.cpu()[~is_nan], expected[~is_nan])
    assert values.cpu()[is_nan].abs().tolist() == [480.0, 480.0]
