"""Configs read from config.json: what transformers reads, and nothing absurd."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from model.config import MAX_PARAMETERS, ModelConfig, RopeConfig
from model.errors import ConfigError
from model.weights.fields import read_json
from model.weights.huggingface import config_from_hf, generation_from_hf
from tests.toy import LLAMA3_ROPE, VARIANTS, YARN_ROPE, toy_config

WHERE = "toy/config.json"


def read(**overrides: Any) -> ModelConfig:
    return config_from_hf(toy_config(**overrides), WHERE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_says_what_transformers_reads(variant: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    overrides = VARIANTS[variant]
    (tmp_path / "config.json").write_text(json.dumps(toy_config(**overrides)))
    theirs = LlamaConfig.from_pretrained(tmp_path)
    ours = read(**overrides)
    assert (
        ours.vocab_size,
        ours.hidden_size,
        ours.intermediate_size,
        ours.num_layers,
        ours.num_heads,
        ours.num_kv_heads,
        ours.head_dim,
        ours.rms_norm_eps,
        ours.max_position_embeddings,
        ours.tie_word_embeddings,
        ours.attention_bias,
        ours.mlp_bias,
    ) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
        theirs.attention_bias,
        theirs.mlp_bias,
    )
    rope = dict(theirs.rope_parameters)
    assert ours.rope.kind == rope.pop("rope_type")
    assert ours.rope.theta == rope.pop("rope_theta")
    rope.pop("type", None)
    assert {name: getattr(ours.rope, name) for name in rope} == rope


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters_is_that_of_transformers(variant: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    overrides = VARIANTS[variant]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(LlamaConfig(**toy_config(**overrides)))
    assert read(**overrides).num_parameters == model.num_parameters()


def test_absent_fields_take_transformers_defaults() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig(vocab_size=320, hidden_size=64, num_attention_heads=4)
    ours = read(
        num_key_value_heads=None,
        max_position_embeddings=None,
        rms_norm_eps=None,
        rope_theta=None,
        tie_word_embeddings=None,
        attention_bias=None,
        mlp_bias=None,
        hidden_act=None,
        torch_dtype=None,
    )
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert (ours.tie_word_embeddings, ours.attention_bias, ours.mlp_bias) == (False, False, False)


def test_null_means_absent() -> None:
    config = toy_config() | {"head_dim": None, "rope_scaling": None, "num_key_value_heads": None}
    ours = config_from_hf(config, WHERE)
    assert (ours.head_dim, ours.num_kv_heads, ours.rope.kind) == (16, 4, "default")


def test_the_configs_own_original_context_wins_over_the_scalings() -> None:
    rope = {"type": "yarn", **YARN_ROPE}
    assert read(rope_scaling=rope, original_max_position_embeddings=256).rope == RopeConfig(
        kind="yarn", factor=4.0, original_max_position_embeddings=256
    )


def test_yarn_without_a_factor_stretches_to_the_whole_context() -> None:
    rope = {"type": "yarn", "original_max_position_embeddings": 128}
    assert read(rope_scaling=rope).rope.factor == 4.0


def test_rope_scaling_wins_over_rope_parameters() -> None:
    config = toy_config(
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "default", "rope_theta": 7.0},
    )
    assert config_from_hf(config, WHERE).rope == RopeConfig(kind="linear", factor=2.0)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LLaMAForCausalLM"])
def test_both_spellings_of_the_architecture_are_read(architecture: str) -> None:
    assert read(architectures=[architecture]).num_layers == 2


def test_newer_dtype_field_is_read() -> None:
    assert read(torch_dtype=None, dtype="bfloat16").dtype == "bfloat16"


def test_end_of_text_may_be_a_list_and_unembedded_ids_are_dropped() -> None:
    assert read(eos_token_id=[7, 3, 7, 320]).eos_token_ids == (7, 3)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["MistralForCausalLM"]},
        "architectures are ['MistralForCausalLM'], not LlamaForCausalLM",
    ),
    "model type": ({"model_type": "qwen2"}, "model_type is 'qwen2'; only llama is served"),
    "no type": ({"model_type": None, "architectures": None}, "model_type is missing"),
    "custom code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
        "auto_map asks for custom code, which is never run",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; a Llama has silu"),
    "quantised": (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config asks for 'awq', not supported",
    ),
    "partial rotation": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is not 1; a Llama rotates whole heads",
    ),
    "partial rotation inside": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is not 1; a Llama rotates whole heads",
    ),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "negative": (
        {"num_hidden_layers": -1},
        "num_hidden_layers must be from 1 to 1024, not -1",
    ),
    "zero": ({"vocab_size": 0}, "vocab_size must be from 1 to 4194304, not 0"),
    "no heads": (
        {"num_attention_heads": 0},
        "hidden_size 64 does not divide by 0 attention heads",
    ),
    "huge": ({"vocab_size": 2**40}, f"vocab_size must be from 1 to 4194304, not {2**40}"),
    "beyond 64 bits": (
        {"hidden_size": 10**30},
        "hidden_size is out of range: 1000000000000000000000000000000",
    ),
    "float": ({"hidden_size": 64.0}, "hidden_size must be an integer, not 64.0"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, not True"),
    "string": ({"hidden_size": "64"}, "hidden_size must be an integer, not '64'"),
    "flag": ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
    "groups": (
        {"num_key_value_heads": 3},
        "num_attention_heads is 4, not a multiple of 3 K/V heads",
    ),
    "more K/V heads": (
        {"num_key_value_heads": 8},
        "num_attention_heads is 4, not a multiple of 8 K/V heads",
    ),
    "odd heads": ({"head_dim": 15}, "head_dim is 15, but rotary embeddings need an even one"),
    "indivisible": (
        {"hidden_size": 66},
        "hidden_size 66 does not divide by 4 attention heads",
    ),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps must be above 0 and at most 1, not 0.0"),
    "NaN epsilon": (
        {"rms_norm_eps": float("nan")},
        "rms_norm_eps must be a finite number, not nan",
    ),
    "positions": (
        {"max_position_embeddings": 2**31},
        f"max_position_embeddings must be from 1 to 134217728, not {2**31}",
    ),
    "NaN theta": ({"rope_theta": float("nan")}, "rope_theta must be a finite number, not nan"),
    "negative theta": (
        {"rope_theta": -1.0},
        "rope_theta must be above 1 and at most 1e+18, not -1.0",
    ),
    "shrinking": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "rope factor must be at least 1 and at most 65536, not 0.5",
    ),
    "infinite factor": (
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        "rope_scaling.factor must be a finite number, not inf",
    ),
    "no factor": ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing"),
    "longrope": (
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "rope_scaling.type is 'su', not one of default, linear, dynamic, llama3, yarn",
    ),
    "llama3 bands": (
        {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
        "rope.high_freq_factor must be greater than low_freq_factor",
    ),
    "rope is no object": (
        {"rope_scaling": [1]},
        "rope_scaling must be an object, not [1]",
    ),
    "dtype": (
        {"torch_dtype": "int4"},
        "torch_dtype is 'int4', not one of float32, float16, bfloat16",
    ),
    "eos": ({"eos_token_id": [1, "2"]}, "eos_token_id must hold token ids, not [1, '2']"),
    "eos negative": ({"eos_token_id": -1}, "eos_token_id must hold token ids, not -1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_config_is_refused_in_one_line_that_names_file_and_field(case: str) -> None:
    overrides, message = REFUSALS[case]
    with pytest.raises(ConfigError) as refusal:
        read(**overrides)
    assert str(refusal.value) == f"{WHERE}: {message}"


def test_dimensions_that_are_each_possible_but_absurd_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"make 2\.\d+e\+14 parameters, more than the 4\.40e\+12"):
        read(
            hidden_size=2**17,
            num_attention_heads=2**10,
            num_key_value_heads=2**10,
            intermediate_size=2**19,
            num_hidden_layers=2**10,
        )


def test_the_largest_llama_is_not_refused() -> None:
    config = read(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    assert 405e9 < config.num_parameters < 406e9 < MAX_PARAMETERS


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((1.0,) * 7, "has 7 values for 8 frequencies"),
        ((1.0,) * 7 + (float("nan"),), "must be above 0"),
        ((1.0,) * 7 + (0.0,), "must be above 0"),
    ],
)
def test_frequency_factors_must_fit_the_heads(factors: tuple[float, ...], message: str) -> None:
    config = dataclasses.replace(read(), rope=RopeConfig(freq_factors=factors))
    with pytest.raises(ConfigError, match=message):
        config.validate(WHERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' appears twice in one object"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": "\udcff"}', "is not valid JSON"),
    ],
)
def test_broken_json_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message) as refusal:
        read_json(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        read_json(tmp_path / "config.json")


def test_generation_defaults_are_read() -> None:
    defaults = generation_from_hf(
        {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "do_sample": True}, WHERE
    )
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 50)
    assert (defaults.min_p, defaults.repetition_penalty) == (None, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature must be from 0.0 to 2.0, not -1.0"),
        ({"top_p": 0}, "top_p must be from 1e-09 to 1.0, not 0.0"),
        ({"top_k": 1.5}, "top_k must be an integer, not 1.5"),
        ({"repetition_penalty": "high"}, "repetition_penalty must be a number, not 'high'"),
    ],
)
def test_impossible_generation_defaults_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        generation_from_hf(values, WHERE)
    assert str(refusal.value) == f"{WHERE}: {message}"
