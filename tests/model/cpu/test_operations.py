"""Each native operation against its torch reference, over sizes that fit no vector evenly."""

import pytest
import torch

from model.cpu.matrices import (
    FLOAT32,
    INT8,
    INT8_BY_32,
    INT8_BY_64,
    STEPS_BY_64,
    STEPS_BY_128,
    Arena,
    Packer,
    Rotation,
)
from model.errors import WeightsError
from model.weights.dequantize import dequantize
from model.weights.tensors import PackedTensor, interleaved_to_halves
from tests.model.cpu.drive import multiply, quantize, rms_norm, swiglu, unpack

FORMS = {
    "float32": FLOAT32,
    "int8": INT8,
    "int8 by 64": INT8_BY_64,
    "int8 by 32": INT8_BY_32,
    "steps by 64": STEPS_BY_64,
    "steps by 128": STEPS_BY_128,
}
BLOCKS = "blocks of 4 bits"  # of a file, which are repacked
SIZES = [(1, 1), (8, 8), (16, 64), (17, 172), (172, 64), (37, 100), (320, 576), (96, 1536)]


@pytest.fixture
def packer(library):
    return Packer(library, Arena())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_matrix(packer, form: str, weight: torch.Tensor, bias: torch.Tensor | None = None):
    """Return a matrix of a form; of blocks one of its size, with the weight's inputs up to 32s."""
    if form != BLOCKS:
        return packer.pack(weight, FORMS[form], bias)
    rows, cols = weight.shape[0], -(-weight.shape[1] // 32) * 32
    blocks = random_blocks("Q4_1", rows, cols).numpy()
    return packer.repack(PackedTensor(blocks=blocks, type="Q4_1", shape=(rows, cols)), bias)


@pytest.mark.parametrize("form", [*FORMS, BLOCKS])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
def test_product_is_that_of_the_stored_numbers(library, packer, form, num_outputs, num_inputs):
    bias = noise(num_outputs, seed=1)
    matrix = make_matrix(packer, form, noise(num_outputs, num_inputs), bias)
    stored = unpack(library, matrix).double()
    # A tile has up to 6 rows; from 19 on blocks of 4 bits are unpacked first.
    for num_rows in (1, 2, 3, 4, 5, 6, 9, 23):
        x = noise(num_rows, matrix.cols, seed=num_rows)
        quantized = quantize(library, x, matrix)
        seen = x.double()
        if form != "float32":
            groups = quantized.codes.view(num_rows, -1, matrix.group).double()
            seen = (groups * quantized.scales[:, :, None]).flatten(1)[:, : matrix.cols]
        out = multiply(library, quantized, [matrix], num_rows)
        expected = seen @ stored.T + bias.double()
        atol = 1e-5 * matrix.cols**0.5 * (30 if form == BLOCKS else 1)  # their minima are large
        assert torch.allclose(out.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("form", [*FORMS, BLOCKS])
def test_row_of_a_product_is_the_same_in_any_company(library, packer, form):
    matrix = make_matrix(packer, form, noise(85, 160))
    x = noise(40, 160, seed=2)
    alone = torch.cat([multiply(library, quantize(library, row, matrix), [matrix], 1)
                       for row in x.split(1)])  # fmt: skip
    for num_rows in (2, 7, 18, 19, 40):
        together = multiply(library, quantize(library, x[:num_rows], matrix), [matrix], num_rows)
        assert torch.equal(together, alone[:num_rows])


def test_parts_of_a_fused_product_lie_side_by_side(library, packer):
    forms = [BLOCKS, "int8 by 32", BLOCKS]
    weights = [noise(rows, 64, seed=rows) for rows in (40, 8, 9)]
    parts = [make_matrix(packer, *each) for each in zip(forms, weights, strict=True)]
    x = noise(7, 64, seed=5)
    together = multiply(library, quantize(library, x, parts[0]), parts, 7)
    alone = [multiply(library, quantize(library, x, part), [part], 7) for part in parts]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("form", [name for name in FORMS if name != "float32"])
def test_quantised_weights_are_within_half_a_step(library, packer, form):
    weight = noise(20, 200)
    weight[3] *= 1000
    weight[4] *= 1e-4
    weight[5] = 0
    matrix = packer.pack(weight, FORMS[form])
    error = (unpack(library, matrix) - weight).abs().amax(1)
    reach = weight.abs().amax(1)
    if form.startswith("steps"):
        # A step is a whole number of int8's; where that helps on the whole the ends are cut off.
        allowed = (weight.amax(1) - weight.amin(1)) * (0.5 / 15 + 0.2) + reach / 127
    else:
        allowed = reach * 0.5 / 127 * 1.01
    assert (error <= allowed).all()
    assert error[5] == 0


def test_row_with_a_number_that_is_not_finite_spoils_itself_alone(library, packer):
    matrix = packer.pack(noise(32, 64), INT8)
    x = noise(3, 64)
    clean = multiply(library, quantize(library, x, matrix), [matrix], 3)
    for bad in (torch.nan, torch.inf):
        x[1, 7] = bad
        out = multiply(library, quantize(library, x, matrix), [matrix], 3)
        assert not out[1].isfinite().any()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(packer, bad):
    weight = noise(16, 64)
    weight[3, 5] = bad
    with pytest.raises(WeightsError, match="16 x 64 weights has some that are not finite"):
        packer.pack(weight, INT8)


def random_blocks(kind: str, rows: int, cols: int) -> torch.Tensor:
    """Blocks of random codes with scales that are sane."""
    size, num_bytes = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144)}[
        kind
    ]
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, cols // size, num_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    num_scales = 1 if kind in ("Q8_0", "Q4_0") else 2
    scales = torch.rand(rows, cols // size, num_scales, generator=generator).to(torch.float16)
    blocks[:, :, : 2 * num_scales] = scales.view(torch.uint8).view(rows, cols // size, -1)
    return blocks.flatten(1)


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_a_file_keep_their_values(library, packer, kind, num_heads):
    rows, cols = 40, 512
    blocks = random_blocks(kind, rows, cols)
    packed = PackedTensor(blocks=blocks.numpy(), type=kind, shape=(rows, cols), num_heads=num_heads)
    expected = dequantize(blocks.numpy(), kind, cols)
    if num_heads is not None:
        expected = interleaved_to_halves(expected, num_heads)
    values = unpack(library, packer.repack(packed))
    if kind == "Q4_K":  # a scale is a product, rounded to float16
        assert (values - expected).abs().max() < 1e-3 * expected.abs().max()
    else:
        assert torch.equal(values, expected)


@pytest.mark.parametrize("size", [8, 64, 100, 172, 576, 2048])
def test_norm_and_activation_equal_torch(library, size):
    x, weight = noise(5, size) * 3, noise(size, seed=1)
    expected = torch.nn.functional.rms_norm(x, (size,), weight, 1e-5)
    assert torch.allclose(rms_norm(library, x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)
    plain = torch.nn.functional.rms_norm(x, (size,), None, 1e-5)
    assert torch.allclose(rms_norm(library, x, None, 1e-5), plain, rtol=1e-5, atol=1e-6)
    gate_up = noise(5, 2 * size, seed=2) * 30
    gate, up = gate_up.chunk(2, dim=1)
    activated = torch.nn.functional.silu(gate) * up
    assert torch.allclose(swiglu(library, gate_up), activated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [8, 96, 172, 576, 2048])
def test_rotation_is_orthogonal_and_spreads_an_outlier(library, size):
    rotation = Rotation(library, Arena(), size, seed=1)
    identity = rotation.rows(torch.eye(size))
    assert torch.allclose(identity @ identity.T, torch.eye(size), atol=1e-5)
    assert identity.abs().max() < 0.9
    x = noise(3, size)
    back = rotation.rows(x)
    library.unrotate(rotation.table, back)
    assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("size", [8, 96, 172, 576, 2048])
def test_weights_are_scaled_and_rotated_while_they_are_packed(library, packer, size):
    rotation = Rotation(library, Arena(), size, seed=1)
    q = rotation.rows(torch.eye(size)).T
    for count in (7, 37):
        reader, writer, norm = noise(count, size), noise(size, count), noise(size, seed=1)
        matrix = packer.pack(reader, FLOAT32, columns=norm, inputs=rotation)
        assert torch.allclose(unpack(library, matrix), reader * norm @ q.T, atol=1e-4)
        matrix = packer.pack(writer, FLOAT32, outputs=rotation)
        assert torch.allclose(unpack(library, matrix), q @ writer, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_every_dtype_of_a_file_keeps_its_values(library, packer, dtype, rows, cols):
    weight = noise(rows, cols).to(dtype)
    weight[0, 0] = torch.finfo(dtype).smallest_normal / 2  # is not flushed to zero
    matrix = packer.pack(weight, FLOAT32)
    assert torch.equal(unpack(library, matrix), weight.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_weights_that_are_not_finite_are_refused_when_rotated(library, packer, dtype, bad, side):
    rotation = Rotation(library, Arena(), 64, seed=1)
    weight = noise(64, 64).to(dtype)
    weight[63, 5] = bad
    with pytest.raises(WeightsError, match="64 x 64 weights has some that are not finite"):
        packer.pack(weight, INT8, **{side: rotation})


def test_smallest_and_largest_weights_there_are_can_be_quantised(library, packer):
    for size in (1e-44, 1e-38, 1e38):
        weight = noise(16, 64).clamp(-3, 3) * size
        stored = unpack(library, packer.pack(weight, INT8))
        assert (stored - weight).abs().max() <= weight.abs().max() * max(0.004, 1e-43 / size)
