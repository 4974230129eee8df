"""A Llama in a GGUF file: its config out of the header, its tensors under canonical names.

Knows llama.cpp's field and tensor names, its row order of query and key projections, and that
Llama 3.1's rotary scaling comes as a tensor of factors. Reference: convert_hf_to_gguf.py and
src/llama-model.cpp of ggml-org/llama.cpp.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from model.config import GenerationDefaults, ModelConfig, RopeConfig, shown
from model.errors import ConfigError
from model.weights.dequantize import dequantize
from model.weights.fields import Fields
from model.weights.gguf import GgufFile, GgufTensorInfo
from model.weights.huggingface import (
    checked_generation,
    first_within_vocabulary,
    within_vocabulary,
)
from model.weights.mapped import MappedFile
from model.weights.tensors import PackedTensor, TensorInfo, interleaved_to_halves

_STEMS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_STEMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FIELD_NAMES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_layers": "llama.block_count",
    "num_heads": "llama.attention.head_count",
    "num_kv_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "llama.context_length",
    "rope.theta": "llama.rope.freq_base",
    "rope.factor": "llama.rope.scaling.factor",
    "rope.original_max_position_embeddings": "llama.rope.scaling.original_context_length",
    "rope.freq_factors": "rope_freqs.weight",
}
_ENDS_OF_TEXT = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def canonical_name(stored_name: str) -> str:
    """Translate llama.cpp's name of a tensor into Hugging Face's; an unknown one is kept."""
    stem, _, kind = stored_name.rpartition(".")
    if stem in _STEMS:
        return f"{_STEMS[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_STEMS:
        return f"model.layers.{parts[1]}.{_LAYER_STEMS[parts[2]]}.{kind}"
    return stored_name


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read and validate the config that a GGUF header spells. Raises ConfigError."""
    fields = Fields(file.fields, str(file.path))
    _refuse_other_models(fields)
    hidden, heads = fields.integer("llama.embedding_length"), _per_layer(fields, "head_count")
    head_dim = _head_dim(fields, hidden, heads)
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding else fields.integer("llama.vocab_size")
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.integer("llama.feed_forward_length"),
        num_layers=fields.integer("llama.block_count"),
        num_heads=heads,
        num_kv_heads=_per_layer(fields, "head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=_shortest(fields.number("llama.attention.layer_norm_rms_epsilon")),
        max_position_embeddings=fields.integer("llama.context_length"),
        rope=_rope(fields, _freq_factors(file, head_dim)),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        # Blocks are scaled by float16, so that nothing is gained by more than 16 bits.
        dtype=_DTYPES.get(embedding.type, "float16") if embedding else "float16",
        bos_token_id=first_within_vocabulary(
            fields.token_ids("tokenizer.ggml.bos_token_id"), vocab_size
        ),
        eos_token_ids=ends_of_text(file, vocab_size),
    )
    config.validate(str(file.path), _FIELD_NAMES)
    return config


def ends_of_text(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of end of text, of turn and of message that a header names."""
    fields = Fields(file.fields, str(file.path))
    found = (token_id for name in _ENDS_OF_TEXT for token_id in fields.token_ids(name))
    return within_vocabulary(tuple(found), vocab_size)


def generation_from_gguf(file: GgufFile) -> GenerationDefaults:
    """Read the sampling defaults that a header recommends. Raises ConfigError."""
    fields = Fields(file.fields, str(file.path))
    defaults = GenerationDefaults(
        temperature=fields.optional_number("general.sampling.temp"),
        top_p=fields.optional_number("general.sampling.top_p"),
        top_k=fields.optional_integer("general.sampling.top_k"),
        min_p=fields.optional_number("general.sampling.min_p"),
        repetition_penalty=fields.optional_number("general.sampling.penalty_repeat"),
    )
    return checked_generation(defaults, str(file.path))


class GgufStore:
    """The tensors of one GGUF file, mapped."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._mapped = MappedFile(file.path)
        self._tensors = {canonical_name(name): info for name, info in file.tensors.items()}
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        self._infos = {
            name: TensorInfo(
                stored_name=info.name,
                file=file.path,
                dtype=_DTYPES.get(info.type, info.type),
                shape=info.shape,
                num_bytes=info.num_bytes,
                offset=info.offset,
                is_readable=True,
            )
            for name, info in self._tensors.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        info = self._tensors[name]
        if info.type in _DTYPES:
            dtype: torch.dtype = getattr(torch, _DTYPES[info.type])
            tensor = self._mapped.tensor(info.offset, dtype, info.shape)
        else:
            blocks = self._mapped.rows(info.offset, *_rows_and_bytes(info))
            tensor = dequantize(blocks, info.type, info.shape[-1]).view(info.shape)
        heads = self._interleaved_heads(name)
        return tensor if heads is None else interleaved_to_halves(tensor, heads)

    def packed(self, name: str) -> PackedTensor | None:
        info = self._tensors[name]
        if info.type in _DTYPES or len(info.shape) != 2:
            return None
        return PackedTensor(
            blocks=self._mapped.rows(info.offset, *_rows_and_bytes(info)),
            type=info.type,
            shape=(info.shape[0], info.shape[1]),
            num_heads=self._interleaved_heads(name),
        )

    def close(self) -> None:
        self._mapped.close()

    def _interleaved_heads(self, name: str) -> int | None:
        """Return the heads of a projection, weight or bias, that is stored for Meta's layout."""
        return self._heads.get(name.split(".")[-2]) if "." in name else None


def _rows_and_bytes(info: GgufTensorInfo) -> tuple[int, int]:
    rows = math.prod(info.shape[:-1])
    return rows, info.num_bytes // rows


def _refuse_other_models(fields: Fields) -> None:
    architecture = fields.text("general.architecture")
    if architecture != "llama":
        raise fields.fail("general.architecture", f"is {shown(architecture)}; only llama is served")
    if fields.integer("llama.expert_count", 0):
        raise fields.fail("llama.expert_count", "is not 0: a mixture of experts is not served")
    parts = fields.integer("split.count", 1)
    if parts > 1:
        raise ConfigError(
            f"{fields.where}: is one of {parts} parts; "
            "join them with llama-gguf-split --merge and name the result"
        )


def _per_layer(fields: Fields, name: str, default: int | None = None) -> int:
    """Read a number of heads, which some writers repeat for every layer."""
    name = f"llama.attention.{name}"
    values = fields.raw(name)
    if not isinstance(values, list):
        return fields.integer(name, default)
    if not values or any(value != values[0] for value in values):
        raise fields.fail(name, "differs from layer to layer")
    return Fields({name: values[0]}, fields.where).integer(name)


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if heads < 1 or ("llama.attention.key_length" not in fields and hidden % heads):
        raise fields.fail("llama.embedding_length", f"{hidden} does not divide by {heads} heads")
    head_dim = fields.integer("llama.attention.key_length", hidden // heads)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise fields.fail(name, f"is {fields.integer(name)}, but heads are {head_dim} wide")
    return head_dim


def _freq_factors(file: GgufFile, head_dim: int) -> tuple[float, ...] | None:
    """Read `rope_freqs.weight`, None where it is absent or changes nothing."""
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.type != "F32" or info.shape != (head_dim // 2,):
        found, wanted = f"{info.type} {list(info.shape)}", f"F32 [{head_dim // 2}]"
        raise ConfigError(f"{file.path}: rope_freqs.weight is {found}, not {wanted}")
    mapped = MappedFile(file.path)
    factors = tuple(mapped.tensor(info.offset, torch.float32, info.shape).tolist())
    return None if all(factor == 1.0 for factor in factors) else factors


def _rope(fields: Fields, freq_factors: tuple[float, ...] | None) -> RopeConfig:
    scaling = "llama.rope.scaling."
    theta = fields.number("llama.rope.freq_base", 10000.0)
    # Before it had a name, scaling was linear; zero meant none.
    factor = fields.number(f"{scaling}factor", fields.number("llama.rope.scale_linear", 1.0)) or 1.0
    kind = fields.text(f"{scaling}type", "linear" if factor != 1.0 else "none")
    attention_factor = fields.number(f"{scaling}attn_factor", 1.0)
    if attention_factor != 1.0 and kind != "yarn":
        raise fields.fail(f"{scaling}attn_factor", f"is {attention_factor} without yarn")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta, freq_factors=freq_factors)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor, freq_factors=freq_factors)
    if kind != "yarn":
        raise fields.fail(f"{scaling}type", f"is {shown(kind)}, not none, linear or yarn")
    if factor < 1.0:
        raise fields.fail(f"{scaling}factor", f"must be at least 1, not {factor}")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=fields.integer(
            f"{scaling}original_context_length", fields.integer("llama.context_length")
        ),
        beta_fast=fields.number(f"{scaling}yarn_beta_fast", 32.0),
        beta_slow=fields.number(f"{scaling}yarn_beta_slow", 1.0),
        # llama.cpp's factor comes on top of yarn's own; ours replaces it.
        attention_factor=(
            None if attention_factor == 1.0 else attention_factor * (0.1 * math.log(factor) + 1.0)
        ),
        freq_factors=freq_factors,
    )


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
