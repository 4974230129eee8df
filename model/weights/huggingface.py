"""Hugging Face's config.json and generation_config.json, read into our own types.

Accepts what is exactly a Llama, in the words of old and new transformers (`rope_scaling` and
`rope_theta`, or `rope_parameters`); refuses other architectures and custom code. Defaults are
those of transformers' LlamaConfig. Knows nothing of tensors.
"""

from collections.abc import Mapping

from model.config import DTYPES, ROPE_KINDS, GenerationDefaults, ModelConfig, RopeConfig, shown
from model.errors import ConfigError
from model.weights.fields import Fields
from model.weights.fp8 import check_quantization

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "eos_token_ids": "eos_token_id",
    "rope.theta": "rope_theta",
    "rope.factor": "rope factor",
    "rope.original_max_position_embeddings": "original_max_position_embeddings",
}


def config_from_hf(values: Mapping[str, object], where: str) -> ModelConfig:
    """Read and validate a config.json. Raises ConfigError."""
    fields = Fields(values, where)
    _refuse_other_models(fields)
    check_quantization(values, where)
    vocab_size = fields.integer("vocab_size")
    heads = fields.integer("num_attention_heads")
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=_head_dim(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        rope=_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        dtype=declared_dtype(values, where) or "float32",
        bos_token_id=first_within_vocabulary(fields.token_ids("bos_token_id"), vocab_size),
        eos_token_ids=within_vocabulary(fields.token_ids("eos_token_id"), vocab_size),
    )
    config.validate(where, HF_NAMES)
    return config


def declared_dtype(values: Mapping[str, object], where: str) -> str | None:
    """Return the dtype that a config.json asks for, None where it is silent."""
    fields = Fields(values, where)
    name = "dtype" if "dtype" in fields else "torch_dtype"
    if name not in fields:
        return None
    dtype = fields.text(name).removeprefix("torch.")
    if dtype not in DTYPES:
        raise fields.fail(name, f"is {shown(dtype)}, not one of {', '.join(DTYPES)}")
    return dtype


def within_vocabulary(token_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Drop ids that the model cannot produce: some configs name an end that was never embedded."""
    return tuple(dict.fromkeys(token_id for token_id in token_ids if token_id < vocab_size))


def first_within_vocabulary(token_ids: tuple[int, ...], vocab_size: int) -> int | None:
    """Return the first id that the model has an embedding for."""
    return next(iter(within_vocabulary(token_ids, vocab_size)), None)


def generation_from_hf(values: Mapping[str, object], where: str) -> GenerationDefaults:
    """Read the sampling defaults of a generation_config.json. Raises ConfigError."""
    fields = Fields(values, where)
    return checked_generation(
        GenerationDefaults(
            temperature=fields.optional_number("temperature"),
            top_p=fields.optional_number("top_p"),
            top_k=fields.optional_integer("top_k"),
            min_p=fields.optional_number("min_p"),
            repetition_penalty=fields.optional_number("repetition_penalty"),
        ),
        where,
    )


def checked_generation(defaults: GenerationDefaults, where: str) -> GenerationDefaults:
    """Return the defaults if every one is a value that a request could ask for."""
    ranges = (
        ("temperature", 0.0, 2.0),
        ("top_p", 1e-9, 1.0),
        ("top_k", -1, 2**22),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 1e-3, 1e3),
    )
    for name, least, most in ranges:
        value = getattr(defaults, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{where}: {name} must be from {least} to {most}, not {value}")
    return defaults


def _refuse_other_models(fields: Fields) -> None:
    if "auto_map" in fields:
        raise fields.fail("auto_map", "asks for custom code, which is never run")
    model_type = fields.text("model_type", "")
    architectures = fields.raw("architectures") or []
    if not isinstance(architectures, list):
        raise fields.fail("architectures", f"must be a list, not {shown(architectures)}")
    if model_type not in ("", "llama"):
        raise fields.fail("model_type", f"is {shown(model_type)}; only llama is served")
    if architectures and not any(name in ARCHITECTURES for name in architectures):
        raise fields.fail("architectures", f"are {shown(architectures)}, not {ARCHITECTURES[0]}")
    if not model_type and not architectures:
        raise fields.fail("model_type", "is missing")
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.fail("hidden_act", f"is {shown(activation)}; a Llama has silu")


def _head_dim(fields: Fields) -> int:
    if "head_dim" in fields:
        return fields.integer("head_dim")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads < 1 or hidden % heads:
        raise fields.fail("hidden_size", f"{hidden} does not divide by {heads} attention heads")
    return hidden // heads


def _rope(fields: Fields) -> RopeConfig:
    """Read rotary parameters; as in transformers, `rope_scaling` wins over `rope_parameters`."""
    scaling = fields.inner("rope_scaling") or fields.inner("rope_parameters")
    theta = fields.number("rope_theta", 10000.0)
    _refuse_partial_rotation(fields)
    if scaling is None:
        return RopeConfig(theta=theta)
    _refuse_partial_rotation(scaling)
    theta = scaling.number("rope_theta", theta)
    declared = scaling.text("rope_type", scaling.text("type", "default"))
    kind = next((kind for kind in ROPE_KINDS if kind == declared), None)
    if kind is None:
        name = "rope_type" if "rope_type" in scaling else "type"
        raise scaling.fail(name, f"is {shown(declared)}, not one of {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind=kind, theta=theta, factor=scaling.number("factor"))
    original = _original_positions(fields, scaling)
    if kind == "llama3":
        return RopeConfig(
            kind=kind,
            theta=theta,
            factor=scaling.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    return _yarn(fields, scaling, theta, original)


def _yarn(fields: Fields, scaling: Fields, theta: float, original: int) -> RopeConfig:
    if original < 1:
        raise scaling.fail("original_max_position_embeddings", f"is {original}")
    stretched = fields.integer("max_position_embeddings", 2048) / original
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=scaling.number("factor", stretched),
        original_max_position_embeddings=original,
        # Zero means the default here, as in transformers.
        beta_fast=scaling.number("beta_fast", 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 1.0) or 1.0,
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _original_positions(fields: Fields, scaling: Fields) -> int:
    """Return the context before scaling; the config's own field wins over the scaling's."""
    name = "original_max_position_embeddings"
    if name in fields:
        return fields.integer(name)
    return scaling.integer(name, fields.integer("max_position_embeddings", 2048))


def _refuse_partial_rotation(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.fail("partial_rotary_factor", "is not 1; a Llama rotates whole heads")
