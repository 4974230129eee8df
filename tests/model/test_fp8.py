"""Models in fp8 on a CPU: the reference of the products, what is in fp8 and what is not.

On a card the same network runs with other operations: tests/gpu, tests/model/kernels.
"""

import random

import pytest
import torch

from model.config import LoadOptions
from model.errors import ConfigError
from model.fp8 import FP8, Fp8Rows, quantize_rows
from model.kv_pool import KVPool
from model.layers.fp8 import (
    Fp8Linear,
    scaled_product,
    scaled_product_reference,
    why_no_scaled_product,
)
from model.layers.linear import Linear
from model.llama import LlamaNetwork
from model.loader import _Reader, _torch_network
from model.memory import plan_memory
from model.precision import choose_precision
from model.weights.checkpoint import open_checkpoint
from tests.model.drive import Schedule, logits_alone
from tests.toy import write_toy_checkpoint
from tests.toy_fp8 import FORMS, rewrite, write_toy_fp8

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    """A card to choose a precision for, though not to run on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def load_in_torch(folder, precision_for=CUDA, **options):
    """Load what a device would get onto the CPU, where the reference multiplies."""
    options = LoadOptions(model=str(folder), kv_cache_memory_bytes=4 << 20, **options)
    checkpoint = open_checkpoint(options)
    precision = choose_precision(options, checkpoint, precision_for)
    plan = plan_memory(options, checkpoint.config, precision, CPU)
    weights = _Reader(checkpoint, None)
    with torch.inference_mode():
        network = _torch_network(checkpoint.config, precision, plan, weights, CPU)
    return checkpoint, precision, network


def random_prompt(config, length=40, seed=0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(config.vocab_size) for _ in range(length)]


def divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    p, q = exact.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_reference_equals_the_product_of_torch():
    x, weight = quantize_rows(drawn(5, 64)), quantize_rows(drawn(32, 64, seed=1))
    try:
        theirs = torch._scaled_mm(
            x.codes,
            weight.codes.t(),
            scale_a=x.scales,
            scale_b=weight.scales.t(),
            out_dtype=torch.bfloat16,
        )
    except (RuntimeError, NotImplementedError):
        pytest.skip("this torch has no such product on a CPU")
    mine = scaled_product_reference(x, weight, torch.bfloat16)
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_reference_is_the_product_of_what_the_codes_stand_for():
    x, weight = quantize_rows(drawn(7, 48)), quantize_rows(drawn(16, 48, seed=1))
    expected = (x.codes.double() * x.scales) @ (weight.codes.double() * weight.scales).T
    got = scaled_product(x, weight, torch.float32)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    assert why_no_scaled_product(CPU) is None


def test_product_whose_scales_are_ignored_is_noticed(monkeypatch):
    monkeypatch.setattr(
        "model.layers.fp8.scaled_product",
        lambda x, weight, dtype: x.codes.to(dtype) @ weight.codes.to(dtype).T,
    )
    assert why_no_scaled_product(CPU) == "its product is wrong"


def test_linear_takes_rows_in_either_form_and_adds_its_bias():
    weight, bias, x = drawn(16, 32, seed=1), drawn(16, seed=2), drawn(3, 32)
    layer = Fp8Linear(
        quantize_rows(weight),
        bias,
        dtype=torch.float32,
        quantize=quantize_rows,
        product=scaled_product,
    )
    assert torch.equal(layer(x), layer(quantize_rows(x)))
    exact = torch.nn.functional.linear(x, weight, bias)
    assert (layer(x) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("variant", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_projections_run_in_fp8_and_nothing_else_does(variant, tmp_path, hopper):
    folder = write_toy_checkpoint(tmp_path, dtype=torch.bfloat16, **variant)
    checkpoint, precision, network = load_in_torch(folder, quantization="fp8")
    assert precision.name == "fp8, bfloat16 K/V, torch"
    for block in network._blocks:
        parts = (block._attention.qkv, block._attention._output, block._mlp.gate_up)
        for part in (*parts, block._mlp._down):
            assert isinstance(part, Fp8Linear)
            assert part.weight.codes.dtype is FP8
    assert type(network._head) is Linear
    assert network._head.weight.dtype is network._embedding.dtype is torch.bfloat16
    _, _, exact = load_in_torch(folder, precision_for=CPU, dtype="bfloat16")
    prompt = random_prompt(checkpoint.config)
    expected = logits_alone(checkpoint.config, exact, prompt)
    got = logits_alone(checkpoint.config, network, prompt)
    assert 1e-5 < divergence(expected, got) < 0.25


def test_bytes_of_the_plan_are_those_that_are_held(tmp_path, hopper):
    folder = write_toy_fp8(tmp_path, "channel", mlp_bias=True)
    _, precision, network = load_in_torch(folder)
    linears = [network._head]
    tensors = [network._embedding, network._norm]
    for block in network._blocks:
        tensors += [block._attention_norm._weight, block._mlp_norm._weight]
        linears += [block._attention.qkv, block._attention._output]
        linears += [block._mlp.gate_up, block._mlp._down]
    for linear in linears:
        parts = linear.weight if isinstance(linear.weight, Fp8Rows) else (linear.weight,)
        tensors += [*parts, *([] if linear.bias is None else [linear.bias])]
    assert precision.weights_bytes == sum(each.nbytes for each in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_fp8_checkpoint_is_served_as_it_is(form, tmp_path, hopper):
    folder = write_toy_fp8(tmp_path, form)
    checkpoint, precision, network = load_in_torch(folder)
    assert precision.quantization == "fp8"
    first, second = network._blocks
    assert type(first._mlp._down) is Linear, "the file keeps it in 16 bits"
    assert isinstance(first._mlp.gate_up, Fp8Linear)
    weight = second._attention.qkv.weight
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    expected = torch.cat([checkpoint.read(name) for name in names])
    got = weight.codes.float() * weight.scales
    if form == "block":
        assert ((got - expected).abs() <= expected.abs() / 16 + weight.scales * 2**-9).all()
    else:
        assert torch.equal(got, expected)
    _, _, exact = load_in_torch(folder, precision_for=CPU, dtype="bfloat16")
    assert type(exact._blocks[0]._attention.qkv) is Linear
    prompt = random_prompt(checkpoint.config)
    expected = logits_alone(checkpoint.config, exact, prompt)
    assert divergence(expected, logits_alone(checkpoint.config, network, prompt)) < 0.25


def test_matrices_whose_sides_do_not_fit_stay_in_16_bits(tmp_path, hopper):
    folder = write_toy_checkpoint(tmp_path, dtype=torch.bfloat16, intermediate_size=168)
    checkpoint, _, network = load_in_torch(folder, quantization="fp8")
    block = network._blocks[0]
    assert type(block._mlp.gate_up) is type(block._mlp._down) is Linear
    assert isinstance(block._attention.qkv, Fp8Linear)
    prompt = random_prompt(checkpoint.config)
    assert logits_alone(checkpoint.config, network, prompt).isfinite().all()


def test_logits_in_fp8_are_the_same_in_any_chunks(tmp_path, hopper):
    checkpoint, _, network = load_in_torch(
        write_toy_checkpoint(tmp_path, dtype=torch.bfloat16), quantization="fp8"
    )
    prompt = random_prompt(checkpoint.config)
    schedule = Schedule(checkpoint.config, network)
    walk = schedule.add(prompt)
    for count in (1, 16, 3, 20):
        schedule.step([(walk, count)])
    alone = logits_alone(checkpoint.config, network, prompt)
    torch.testing.assert_close(torch.stack(walk.logits), alone, rtol=0, atol=0.2)


def test_keys_and_values_in_fp8_take_the_scales_of_the_file(tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    scales = {"k_scale": 0.03, "v_scale": 0.02}
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        rewrite(folder, {prefix + name: torch.tensor(scale) for name, scale in scales.items()})
    options = {"precision_for": CPU, "dtype": "bfloat16"}
    checkpoint, precision, network = load_in_torch(folder, kv_cache_dtype="fp8", **options)
    assert precision.name == "bfloat16, fp8 K/V, torch"
    pool = network._attention._pool
    assert pool.keys[0].dtype is FP8
    assert pool.key_scales == pytest.approx([0.03] * 2)
    assert pool.value_scales == pytest.approx([0.02] * 2)
    _, _, exact = load_in_torch(folder, **options)
    prompt = random_prompt(checkpoint.config)
    expected = logits_alone(checkpoint.config, exact, prompt)
    got = logits_alone(checkpoint.config, network, prompt)
    assert 0 < divergence(expected, got) < 0.25


def choose(folder, device=CUDA, **options):
    options = LoadOptions(model=str(folder), **options)
    return choose_precision(options, open_checkpoint(options), device)


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        (CPU, {}, "only --device cuda has it; a CPU has int8"),
        (CUDA, {"dtype": "float16"}, "it is bfloat16"),
        (CUDA, {"kv_cache_dtype": "int8"}, "here it can be bfloat16 or fp8"),
    ],
)
def test_what_does_not_go_with_fp8_is_refused(device, options, message, tmp_path, hopper):
    folder = write_toy_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=message):
        choose(folder, device, quantization="fp8", **options)


def test_older_card_refuses_fp8_and_serves_fp8_files_in_16_bits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    folder = write_toy_fp8(tmp_path, "channel")
    with pytest.raises(ConfigError, match=r"capability 8.9 or more, this one has 8\.0"):
        choose(folder, quantization="fp8")
    assert choose(folder).name == "bfloat16, bfloat16 K/V, torch"
    assert "fp8 is served as bfloat16" in caplog.text
    assert choose(folder, kv_cache_dtype="fp8").kv_cache_dtype == "fp8"


def test_table_of_a_card(tmp_path, hopper):
    plain = write_toy_checkpoint(tmp_path / "plain", dtype=torch.bfloat16)
    fp8 = write_toy_fp8(tmp_path / "fp8", "tensor")
    assert choose(plain).name == "bfloat16, bfloat16 K/V, torch"
    assert choose(plain, quantization="fp8", dtype="bfloat16").quantization == "fp8"
    assert choose(fp8).name == "fp8, bfloat16 K/V, torch"
    assert choose(fp8, quantization="none").name == "bfloat16, bfloat16 K/V, torch"
    assert choose(fp8, dtype="float16").name == "float16, float16 K/V, torch"
    invariant = choose(fp8, batch_invariant=True, kv_cache_dtype="fp8")
    assert invariant.name == "fp8, fp8 K/V, torch, batch-invariant"


def test_batch_invariance_changes_nothing_on_a_cpu(tmp_path):
    folder = write_toy_checkpoint(tmp_path)
    options = {"dtype": "bfloat16", "device": CPU}
    assert choose(folder, batch_invariant=True, **options) == choose(folder, **options)


def test_network_without_fp8_is_what_it_was(tmp_path):
    """`read_fp8` that gives nothing is none at all."""
    checkpoint = open_checkpoint(LoadOptions(model=str(write_toy_checkpoint(tmp_path))))
    config = checkpoint.config
    networks = []
    for read_fp8 in (None, lambda name: None):
        pool = KVPool(config, num_blocks=400, block_size=16, dtype=torch.float32, device=CPU)
        with torch.inference_mode():
            networks.append(LlamaNetwork(config, checkpoint.read, pool, 320, read_fp8=read_fp8))
    prompt = random_prompt(config)
    first, second = (logits_alone(config, network, prompt) for network in networks)
    assert torch.equal(first, second)
