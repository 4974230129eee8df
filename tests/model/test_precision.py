"""The table of schemes: what each file, device and flag gives, and what is refused."""

import logging
import shutil

import pytest
import torch

from model.config import LoadOptions
from model.cpu.build import COMPILERS
from model.errors import ConfigError
from model.loader import inspect_model, load_model
from model.precision import choose_precision
from model.weights.checkpoint import open_checkpoint
from tests.toy import write_toy_checkpoint, write_toy_gguf

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    if not any(shutil.which(name) for name in COMPILERS):
        pytest.skip("no C compiler")
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


def choose(folder, cache, device=CPU, **options):
    options = LoadOptions(model=str(folder), cache_dir=cache, **options)
    return choose_precision(options, open_checkpoint(options), device)


def test_safetensors_are_served_in_8_bits(folder, cache):
    chosen = choose(folder, cache)
    assert (chosen.quantization, chosen.kv_cache_dtype) == ("int8", "int8")
    assert chosen.library is not None
    assert chosen.name.startswith("int8, int8 K/V, native ")


def test_explicit_dtype_means_no_quantization(folder, cache):
    float32 = choose(folder, cache, dtype="float32")
    assert (float32.quantization, float32.kv_cache_dtype) == ("none", "float32")
    assert float32.library is not None
    bfloat16 = choose(folder, cache, dtype="bfloat16")
    assert (bfloat16.name, bfloat16.library) == ("bfloat16, bfloat16 K/V, torch", None)


def test_gpu_keeps_the_dtype_of_the_file(folder, cache):
    chosen = choose(folder, cache, device=torch.device("cuda"))
    assert (chosen.quantization, chosen.dtype) == ("none", "bfloat16")
    assert chosen.library is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int8", "dtype": "float32"}, "choose one"),
        ({"quantization": "int4", "block_size": 8}, "multiple of 16"),
        ({"dtype": "float8"}, "choose one of auto"),
        ({"kv_cache_dtype": "bfloat16"}, "int8 or float16 or float32"),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float16"}, "here it can be bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, cache, options, message):
    with pytest.raises(ConfigError, match=message):
        choose(folder, cache, **options)


def test_quantization_on_a_gpu_is_refused(folder, cache):
    with pytest.raises(ConfigError, match="only --device cpu"):
        choose(folder, cache, device=torch.device("cuda"), quantization="int8")


def test_block_size_that_the_native_step_lacks_falls_back_with_a_word(folder, cache, caplog):
    with caplog.at_level(logging.WARNING):
        chosen = choose(folder, cache, block_size=8)
    assert chosen.name == "float32, float32 K/V, torch"
    assert "no native CPU step" in caplog.text


def test_scheme_is_part_of_the_fingerprint(folder, cache):
    prints = {
        inspect_model(
            LoadOptions(model=str(folder), cache_dir=cache, device="cpu", **options)
        ).fingerprint
        for options in (
            {},
            {"dtype": "float32"},
            {"dtype": "bfloat16"},
            {"kv_cache_dtype": "float32"},
        )
    }
    assert len(prints) == 4


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_weights_of_the_plan_are_those_that_are_packed(folder, cache, quantization):
    loaded = load_model(
        LoadOptions(model=str(folder), cache_dir=cache, device="cpu", quantization=quantization)
    )
    packed = loaded.runner._network.weights_bytes
    # Toy rows hardly fill a panel; padding and the rotation come on top.
    assert loaded.info.plan.weights_bytes <= packed < 1.3 * loaded.info.plan.weights_bytes + 50_000


def test_file_in_8_bits_is_not_taken_for_one_in_4(tmp_path, cache):
    path = write_toy_gguf(tmp_path / "model.gguf")
    assert choose(path, cache).quantization == "int8"
