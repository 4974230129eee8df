"""The tensors of a Llama by name and shape, and what a file says it holds of them.

Canonical names and layouts are Hugging Face's: `model.layers.N.self_attn.q_proj.weight`, rotary
halves not interleaved. A `TensorStore` gives tensors under these names whatever the format;
`verify_tensors` compares its headers with a config before anything is allocated.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig, shown
from model.errors import WeightsError

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What headers say about one tensor, under its canonical name."""

    stored_name: str  # the file's own name for it
    file: Path
    dtype: str  # float32, float16, bfloat16; a GGUF block type such as Q4_K; else the file's word
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0  # of the first byte in the file, where the format has one
    is_readable: bool  # false: the dtype is none that weights may have


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A matrix as GGUF stores it: rows of quantised blocks, mapped from the file.

    With `num_heads` the rows of each head are interleaved for rotary embedding: stored row
    2 i + j of a head is canonical row i + j * head_dim / 2.
    """

    blocks: npt.NDArray[np.uint8]  # [rows, bytes per row], read-only
    type: str  # Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K
    shape: tuple[int, int]  # rows, columns
    num_heads: int | None = None  # None: rows are in canonical order


class TensorStore(Protocol):
    """Open weight files, whatever their format."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What headers say, by canonical name; unknown tensors keep their own names."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in canonical layout, mapped from the file where possible."""
        ...

    def packed(self, name: str) -> PackedTensor | None:
        """Return the quantised form of a matrix, None where there is none."""
        ...

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        ...


def required_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor that a model of this config is made of."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_size, config.attention_bias),
        "mlp.gate_proj": (ffn, hidden, config.mlp_bias),
        "mlp.up_proj": (ffn, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, ffn, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, (rows, columns, biased) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if biased:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes[NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def verify_tensors(config: ModelConfig, store: TensorStore, source: Path) -> None:
    """Refuse a checkpoint that lacks a tensor or has one of wrong shape or dtype.

    Reads headers only. Tensors that no Llama has are logged and left alone.
    Raises WeightsError for the first fault, in the order of the network.
    """
    required = required_tensors(config)
    for name, shape in required.items():
        info = store.infos.get(name)
        if info is None:
            raise WeightsError(f"{source}: tensor {name} is missing")
        where = f"{info.file}: tensor {shown(info.stored_name)}"
        if info.shape != shape:
            raise WeightsError(f"{where} has shape {list(info.shape)}, not {list(shape)}")
        if not info.is_readable:
            raise WeightsError(f"{where} is stored as {info.dtype}, which is not supported")
    extra = [name for name in store.infos if name not in required and not _is_harmless(name)]
    if extra:
        logger.warning(
            "%s: %d tensors are not part of a Llama of this config and are not used, such as %s",
            source,
            len(extra),
            shown(extra[0]),
        )


def _is_harmless(name: str) -> bool:
    """True for tables that are computed anyway, and for the unused head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or name in (HEAD, "rope_freqs.weight", "rope.freqs")


def fingerprint(config: ModelConfig, store: TensorStore) -> str:
    """Return 16 hex digits over config, tensor headers and file sizes; contents are not read."""
    digest = hashlib.sha256(repr(config).encode())
    for name, info in sorted(store.infos.items()):
        place = f"{info.file.name} {info.offset}"
        digest.update(f"{name!r} {info.dtype} {info.shape} {place}\n".encode())
    for file in sorted({info.file for info in store.infos.values()}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def interleaved_to_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from Meta's rotary layout to Hugging Face's.

    Within a head, rows come as pairs (0, 1), (2, 3), … that rotate together; here the partner of
    row i is row i + head_dim / 2. `rows` is [heads * head_dim] or [heads * head_dim, columns].
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
