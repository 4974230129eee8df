"""The product of fixed tiles: equal to torch's, and a row's bits the same in any company.

The interpreter truncates to bfloat16 where a card rounds to nearest: one unit in the last place.
Its products are numpy's, whose BLAS sums some rows of a tile in another order than others. So
there a row keeps its place in the tile; on a card it may lie anywhere.
"""

import pytest
import torch

from model.fp8 import Fp8Rows, quantize_rows
from model.kernels.launch import is_interpreted
from model.kernels.matmul import BLOCK_M, invariant_linear, invariant_scaled_product
from model.layers.fp8 import scaled_product_reference

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 16, 16), (5, 40, 100), (64, 130, 64), (70, 24, 200)]  # rows, out, in


def make(generator, device, dtype, *shape):
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_equals_torch(dtype, has_bias, device, generator):
    for num_rows, num_outputs, size in SHAPES:
        x = make(generator, device, dtype, num_rows, size)
        weight = make(generator, device, dtype, num_outputs, size)
        bias = make(generator, device, dtype, num_outputs) if has_bias else None
        wide = x.double() @ weight.double().t()
        expected = (wide if bias is None else wide + bias.double()).to(dtype)
        tolerance = TOLERANCES[dtype]
        got = invariant_linear(x, weight, bias)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * size**0.5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype, device, generator):
    weight = make(generator, device, dtype, 40, 200)
    row = make(generator, device, dtype, 1, 200)
    alone = invariant_linear(row, weight)
    for num_rows in (2, 16, 63, 64, 65, 130):
        x = make(generator, device, dtype, num_rows, 200)
        places = range(0, num_rows, BLOCK_M if is_interpreted() else 7)
        for at in places:
            x[at] = row[0]
            assert torch.equal(invariant_linear(x, weight)[at], alone[0]), (num_rows, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_in_fp8_equals_its_reference(dtype, device, generator):
    for num_rows, num_outputs, size in SHAPES:
        x, weight = (
            quantize_rows(make(generator, device, torch.float32, rows, size))
            for rows in (num_rows, num_outputs)
        )
        got = invariant_scaled_product(x, weight, dtype)
        expected = scaled_product_reference(x, weight, dtype)
        torch.testing.assert_close(got, expected, rtol=TOLERANCES[dtype], atol=1e-4)


def test_a_row_in_fp8_has_the_same_bits_alone_and_in_any_company(device, generator):
    weight = quantize_rows(make(generator, device, torch.float32, 48, 208))
    rows = quantize_rows(make(generator, device, torch.float32, 70, 208))
    alone = Fp8Rows(rows.codes[:1], rows.scales[:1])
    expected = invariant_scaled_product(alone, weight, torch.bfloat16)
    for num_rows in (2, 64, 70):
        some = Fp8Rows(rows.codes[:num_rows], rows.scales[:num_rows])
        got = invariant_scaled_product(some, weight, torch.bfloat16)
        assert torch.equal(got[:1], expected), num_rows
