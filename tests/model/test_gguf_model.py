"""Llamas out of GGUF files: config, names, row order and numbers against gguf-py, transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from model.config import GenerationDefaults, LoadOptions, RopeConfig
from model.errors import ConfigError, WeightsError
from model.weights.checkpoint import Checkpoint, open_checkpoint
from model.weights.dequantize import dequantize
from model.weights.huggingface import config_from_hf
from model.weights.tensors import interleaved_to_halves
from tests.toy import (
    GGUF_VARIANTS,
    LLAMA3_ROPE,
    VARIANTS,
    YARN_ROPE,
    toy_config,
    toy_state,
    write_toy_gguf,
)

QUANTS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def open_gguf(path: Path) -> Checkpoint:
    return open_checkpoint(LoadOptions(model=str(path)))


def sizes_for(quant: str) -> dict[str, int]:
    """Dimensions that are multiples of the type's block."""
    return {"hidden_size": 256, "intermediate_size": 512} if quant.endswith("K") else {}


@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_config_is_that_of_the_hugging_face_form(variant: str, tmp_path: Path) -> None:
    overrides = VARIANTS[variant]
    expected = config_from_hf(toy_config(**overrides), "config.json")
    config = open_gguf(write_toy_gguf(tmp_path, **overrides)).config
    if expected.rope.kind == "llama3":  # which GGUF carries as factors
        assert config.rope.freq_factors is not None
        config = dataclasses.replace(config, rope=expected.rope)
    assert config == expected


@pytest.mark.parametrize("variant", GGUF_VARIANTS)
def test_tensors_are_those_of_the_hugging_face_form(variant: str, tmp_path: Path) -> None:
    overrides = VARIANTS[variant]
    checkpoint = open_gguf(write_toy_gguf(tmp_path, **overrides))
    expected = toy_state(toy_config(**overrides))
    assert set(checkpoint.tensor_names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_tensors_equal_those_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_toy_gguf(tmp_path, quant="Q5_1")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"]))
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    theirs: dict[str, torch.Tensor] = loaded["tensors"]
    checkpoint = open_gguf(path)
    assert set(checkpoint.tensor_names()) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_frequency_factors_divide_to_llama_3s_frequencies(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = open_gguf(write_toy_gguf(tmp_path, **VARIANTS["llama3"])).config
    assert (config.rope.kind, config.rope.theta) == ("default", 500000.0)
    assert config.rope.freq_factors is not None
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    ours = 500000.0**-exponents / torch.tensor(config.rope.freq_factors)
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**toy_config(rope_parameters=rope)))
    torch.testing.assert_close(ours, theirs.inv_freq)


@pytest.mark.parametrize("quant", QUANTS)
def test_blocks_are_dequantised_bit_for_bit_as_by_gguf_py(quant: str) -> None:
    kind = gguf.GGMLQuantizationType[quant]
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    # Every bit pattern, scales that are infinite or no number included; more rows than one slice.
    shape = (600, 1024 // block_len * block_bytes)
    raw = generator.integers(0, 256, shape, dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.dequantize(raw, kind)
    ours = dequantize(raw, quant, 1024).numpy()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("quant", QUANTS)
def test_file_of_each_type_is_read_as_by_gguf_py(quant: str, tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path, quant=quant, **sizes_for(quant))
    checkpoint = open_gguf(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for ours, stored in (
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        expected = gguf.dequantize(theirs[stored].data, theirs[stored].tensor_type)
        np.testing.assert_array_equal(checkpoint.read(ours).numpy(), expected)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_plain_types_keep_their_dtype(quant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = open_gguf(write_toy_gguf(tmp_path, quant=quant))
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(checkpoint.read(Q_PROJ), toy_state(toy_config())[Q_PROJ].to(dtype))


@pytest.mark.parametrize("quant", QUANTS)
def test_packed_blocks_unpack_to_what_is_read(quant: str, tmp_path: Path) -> None:
    checkpoint = open_gguf(write_toy_gguf(tmp_path, quant=quant, **sizes_for(quant)))
    packed = checkpoint.packed(Q_PROJ)
    assert packed is not None
    assert (packed.type, packed.num_heads) == (quant, 4)
    rows = dequantize(packed.blocks, packed.type, packed.shape[1])
    assert torch.equal(interleaved_to_halves(rows, 4), checkpoint.read(Q_PROJ))


def test_packed_rows_of_other_matrices_are_in_order(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_toy_gguf(tmp_path, quant="Q8_0"))
    packed = checkpoint.packed("model.embed_tokens.weight")
    assert packed is not None
    assert packed.num_heads is None
    assert not packed.blocks.flags.writeable
    rows = dequantize(packed.blocks, packed.type, packed.shape[1])
    assert torch.equal(rows, checkpoint.read("model.embed_tokens.weight"))


def test_what_is_not_quantised_has_no_packed_form(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_toy_gguf(tmp_path, quant="F16"))
    assert checkpoint.packed(Q_PROJ) is None
    assert checkpoint.packed("model.norm.weight") is None


def test_tensor_stays_valid_after_close(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_toy_gguf(tmp_path))
    norm = checkpoint.read("model.norm.weight")
    checkpoint.close()
    assert torch.equal(norm, toy_state(toy_config())["model.norm.weight"])
    with pytest.raises(WeightsError, match="was read from after it was closed"):
        checkpoint.read("model.norm.weight")


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    before = path.read_bytes()
    open_gguf(path).read("model.norm.weight").zero_()
    assert path.read_bytes() == before


def test_ends_of_text_are_eos_eot_and_eom(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 7}
    checkpoint = open_gguf(write_toy_gguf(tmp_path, fields=ends))
    assert checkpoint.eos_token_ids == (0, 3, 7)
    assert checkpoint.config.bos_token_id == 1


def test_tokenizer_lies_in_the_file_itself(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    assert open_gguf(path).tokenizer_path == path
    assert open_gguf(tmp_path).tokenizer_path == path


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    checkpoint = open_gguf(write_toy_gguf(tmp_path, fields=fields))
    assert checkpoint.generation == GenerationDefaults(temperature=0.5, top_k=20)


def test_yarns_attention_factor_comes_on_top_of_its_own(tmp_path: Path) -> None:
    path = write_toy_gguf(
        tmp_path,
        fields={"llama.rope.scaling.attn_factor": 2.0},
        rope_scaling={"type": "yarn", **YARN_ROPE},
    )
    factor = open_gguf(path).config.rope.attention_factor
    assert factor == pytest.approx(2.0 * (0.1 * np.log(4.0) + 1.0))


def rope_of(folder: Path, **fields: Any) -> RopeConfig:
    prefixed = {f"llama.rope.{name}": value for name, value in fields.items()}
    return open_gguf(write_toy_gguf(folder, fields=prefixed)).config.rope


def test_scaling_without_a_type_is_linear(tmp_path: Path) -> None:
    assert rope_of(tmp_path, **{"scaling.factor": 4.0}) == RopeConfig(kind="linear", factor=4.0)
    assert rope_of(tmp_path, scale_linear=2.0) == RopeConfig(kind="linear", factor=2.0)
    assert rope_of(tmp_path, **{"scaling.factor": 0.0}) == RopeConfig()


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": (
        {"fields": {"llama.expert_count": 8}},
        "llama.expert_count is not 0: a mixture of experts is not served",
    ),
    "parts": (
        {"fields": {"split.count": 3}},
        "is one of 3 parts; join them with llama-gguf-split --merge and name the result",
    ),
    "longrope": (
        {"fields": {"llama.rope.scaling.type": "longrope"}},
        "llama.rope.scaling.type is 'longrope', not none, linear or yarn",
    ),
    "attention factor": (
        {"fields": {"llama.rope.scaling.attn_factor": 2.0}},
        "llama.rope.scaling.attn_factor is 2.0 without yarn",
    ),
    "groups": (
        {"num_key_value_heads": 3, "head_dim": 16},
        "llama.attention.head_count is 4, not a multiple of 3 K/V heads",
    ),
    "epsilon": (
        {"rms_norm_eps": float("nan")},
        "llama.attention.layer_norm_rms_epsilon must be a finite number, not nan",
    ),
    "theta": (
        {"rope_theta": 0.0},
        "llama.rope.freq_base must be above 1 and at most 1e+18, not 0.0",
    ),
    "shrinking": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "llama.rope.scaling.factor must be at least 1 and at most 65536, not 0.5",
    ),
    "shrinking yarn": (
        {"rope_scaling": {"type": "yarn", **YARN_ROPE, "factor": 0.5}},
        "llama.rope.scaling.factor must be at least 1, not 0.5",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_header_is_refused_in_one_line_that_names_the_field(case: str, tmp_path: Path) -> None:
    overrides, message = REFUSALS[case]
    path = write_toy_gguf(tmp_path, **overrides)
    with pytest.raises(ConfigError) as refusal:
        open_gguf(path)
    assert str(refusal.value) == f"{path}: {message}"


def overwrite(path: Path, name: str, skip: int, value: bytes) -> None:
    """Replace what stands `skip` bytes behind the only place of a name."""
    raw = path.read_bytes()
    assert raw.count(name.encode()) == 1
    at = raw.index(name.encode()) + len(name) + skip
    path.write_bytes(raw[:at] + value + raw[at + len(value) :])


def test_absurd_number_of_layers_is_refused(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    overwrite(path, "llama.block_count", 4, (2**31).to_bytes(4, "little"))
    with pytest.raises(ConfigError) as refusal:
        open_gguf(path)
    assert str(refusal.value) == f"{path}: llama.block_count must be from 1 to 1024, not {2**31}"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"architecture is 'qwen2'; only llama is served"):
        open_gguf(path)


def test_missing_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    overwrite(path, "blk.1.ffn_up.weight", -len("ffn_up.weight"), b"FFN")
    with pytest.raises(WeightsError) as refusal:
        open_gguf(path)
    assert str(refusal.value) == f"{path}: tensor model.layers.1.mlp.up_proj.weight is missing"


def test_misshapen_tensor_is_refused_by_the_files_own_name(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    # Behind the name: the number of dimensions, then the columns.
    overwrite(path, "blk.1.ffn_up.weight", 4, (32).to_bytes(8, "little"))
    with pytest.raises(WeightsError) as refusal:
        open_gguf(path)
    message = "tensor 'blk.1.ffn_up.weight' has shape [160, 32], not [160, 64]"
    assert str(refusal.value) == f"{path}: {message}"


def test_factors_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path, head_dim=32, **VARIANTS["llama3"])
    overwrite(path, "rope_freqs.weight", 4, (8).to_bytes(8, "little"))
    with pytest.raises(ConfigError) as refusal:
        open_gguf(path)
    assert str(refusal.value) == f"{path}: rope_freqs.weight is F32 [8], not F32 [16]"
