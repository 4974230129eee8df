"""Meta's own release format: params.json and consolidated.NN.pth, one file a tensor-parallel rank.

Owns the names and the way ranks split a tensor; pieces are joined when a tensor is read. The files
are archives of pickles, opened by torch's weights-only unpickler with their tensors mapped.
Reference: llama/model.py of meta-llama/llama, convert_llama_weights_to_hf.py of transformers.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch

from model.config import ModelConfig, RopeConfig, shown
from model.errors import WeightsError
from model.weights.fields import Fields
from model.weights.tensors import PackedTensor, TensorInfo, interleaved_to_halves

PARAMS = "params.json"
_STEMS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER_STEMS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_PARAM_NAMES = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "intermediate_size": "ffn size (dim, multiple_of, ffn_dim_multiplier)",
    "rope.theta": "rope_theta",
    "rope.factor": "rope_scaling_factor",
}
# What the unpickler raises for a damaged stream depends on where the damage is.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def canonical_name(stored_name: str) -> str:
    """Translate Meta's name of a tensor into Hugging Face's; an unknown one is kept."""
    stem, _, kind = stored_name.rpartition(".")
    if stem in _STEMS:
        return f"{_STEMS[stem]}.{kind}"
    layers, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if layers == "layers" and part in _LAYER_STEMS:
        return f"model.layers.{layer}.{_LAYER_STEMS[part]}.{kind}"
    return stored_name


def config_from_meta(
    params: Mapping[str, object], vocab_size: int, where: str, *, dtype: str, is_tied: bool
) -> ModelConfig:
    """Read and validate a params.json; the weights tell what it leaves out. Raises ConfigError.

    `vocab_size` is that of the embedding, for files that say -1.
    """
    fields = Fields(params, where)
    for name in ("quantization_args", "lora_args", "moe_args", "moe"):
        if name in fields:
            raise fields.fail(name, "is not supported")
    dim, heads = fields.integer("dim"), fields.integer("n_heads")
    if heads < 1 or dim % heads:
        raise fields.fail("dim", f"{dim} does not divide by {heads} heads")
    declared = fields.integer("vocab_size", -1)
    config = ModelConfig(
        vocab_size=vocab_size if declared == -1 else declared,
        hidden_size=dim,
        intermediate_size=_ffn_size(fields, dim),
        num_layers=fields.integer("n_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("n_kv_heads", heads),
        head_dim=dim // heads,
        rms_norm_eps=fields.number("norm_eps", 1e-5),
        max_position_embeddings=_context(fields),
        rope=_rope(fields, dim),
        tie_word_embeddings=is_tied,
        dtype=dtype,
    )
    config.validate(where, _PARAM_NAMES)
    return config


def _ffn_size(fields: Fields, dim: int) -> int:
    """Two thirds of 4 dim, stretched, then rounded up: SwiGLU at the cost of a plain MLP."""
    multiple_of = fields.integer("multiple_of", 256)
    stretch = fields.number("ffn_dim_multiplier", 1.0)
    if not 1 <= multiple_of <= 2**19:
        raise fields.fail("multiple_of", f"is {multiple_of}")
    if not 0.0 < stretch <= 64.0:
        raise fields.fail("ffn_dim_multiplier", f"is {stretch}")
    size = int(stretch * int(8 * dim / 3))
    return -(-size // multiple_of) * multiple_of


def _context(fields: Fields) -> int:
    """Return the context that a model was trained for, which params.json never says.

    Told apart by what does differ: Llama 3.1 and later scale the rotary embedding, Llama 3 and
    Code Llama have their own theta, Llama 2 another epsilon than LLaMA 1.
    """
    theta = fields.number("rope_theta", 10000.0)
    if fields.flag("use_scaled_rope", False):
        return 131072
    if theta >= 1e6:
        return 16384
    if theta >= 5e5:
        return 8192
    return 4096 if fields.number("norm_eps", 1e-5) == 1e-5 else 2048


def _rope(fields: Fields, dim: int) -> RopeConfig:
    theta = fields.number("rope_theta", 10000.0)
    if not fields.flag("use_scaled_rope", False):
        return RopeConfig(theta=theta)
    # Before the file named a factor it was 8, and 32 for the small models of Llama 3.2.
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=fields.number("rope_scaling_factor", 8.0 if dim >= 4096 else 32.0),
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=fields.number("rope_high_freq_factor", 4.0),
    )


class MetaStore:
    """The tensors of all ranks, joined one at a time."""

    def __init__(self, folder: Path, params: Mapping[str, object]) -> None:
        fields = Fields(params, str(folder / PARAMS))
        self._dim, self._heads = fields.integer("dim"), fields.integer("n_heads")
        self._kv_heads = fields.integer("n_kv_heads", self._heads)
        self._files = _rank_files(folder)
        self._ranks = [_load(file) for file in self._files]
        self._refuse_missing_ranks(folder)
        self._stored_names = {canonical_name(name): name for name in self._ranks[0]}
        self._infos = {name: self._info(name) for name in self._stored_names}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        if not self._ranks:
            raise WeightsError(f"tensor {name} was asked for after its files were closed")
        stored_name = self._stored_names[name]
        pieces = [rank[stored_name] for rank in self._ranks]
        axis = self._split_axis(stored_name, pieces[0])
        whole = pieces[0] if axis is None else torch.cat(pieces, dim=axis)
        if name.endswith("q_proj.weight"):
            return interleaved_to_halves(whole, self._heads)
        if name.endswith("k_proj.weight"):
            return interleaved_to_halves(whole, self._kv_heads)
        return whole

    def packed(self, name: str) -> PackedTensor | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        self._ranks = []

    def _split_axis(self, stored_name: str, piece: torch.Tensor) -> int | None:
        """Return the axis along which ranks hold pieces, None for what each holds whole."""
        if len(self._ranks) == 1 or piece.dim() < 2:
            return None
        if stored_name.endswith(_SPLIT_BY_COLUMNS):
            return 1
        if stored_name == "tok_embeddings.weight":  # by columns up to Llama 2, then by rows
            return 0 if piece.shape[1] == self._dim else 1
        return 0

    def _info(self, name: str) -> TensorInfo:
        stored_name = self._stored_names[name]
        first = self._ranks[0][stored_name]
        for file, rank in zip(self._files, self._ranks, strict=True):
            piece = rank.get(stored_name)
            if piece is None:
                raise WeightsError(f"{file}: tensor {shown(stored_name)} is missing")
            if piece.shape != first.shape or piece.dtype != first.dtype:
                raise WeightsError(
                    f"{file}: tensor {shown(stored_name)} is {piece.dtype} {list(piece.shape)}, "
                    f"but {first.dtype} {list(first.shape)} in {self._files[0].name}"
                )
        shape = list(first.shape)
        axis = self._split_axis(stored_name, first)
        if axis is not None:
            shape[axis] *= len(self._ranks)
        return TensorInfo(
            stored_name=stored_name,
            file=self._files[0],
            dtype=str(first.dtype).removeprefix("torch."),
            shape=tuple(shape),
            num_bytes=first.nbytes * (1 if axis is None else len(self._ranks)),
            is_readable=first.dtype in _FLOATS,
        )

    def _refuse_missing_ranks(self, folder: Path) -> None:
        """Tell from a query projection, whose rows make up `dim`, how many files there were."""
        query = self._ranks[0].get("layers.0.attention.wq.weight")
        if query is None or query.dim() != 2 or not query.shape[0]:
            return
        ranks = max(1, self._dim // query.shape[0])
        if ranks > len(self._ranks):
            raise WeightsError(
                f"{folder}: the weights are split in {ranks} consolidated files, "
                f"of which {len(self._ranks)} are here"
            )


def _rank_files(folder: Path) -> list[Path]:
    """Return consolidated.00.pth and those that follow it, without a gap."""
    files = sorted(folder.glob("consolidated.*.pth"))
    for rank, file in enumerate(files):
        expected = f"consolidated.{rank:02}.pth"
        if file.name != expected:
            raise WeightsError(f"{folder / expected}: is missing, though {file.name} is there")
    if not files:
        raise WeightsError(f"{folder}: has no consolidated.00.pth")
    return files


def _load(file: Path) -> dict[str, torch.Tensor]:
    """Map one archive without running any code that it may hold."""
    _refuse_other_archives(file)
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"{file}: holds something other than tensors, which is never unpickled"
        ) from error
    except _DAMAGE as error:
        raise WeightsError(f"{file}: is damaged: {shown(str(error))}") from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{file}: holds no dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{file}: {shown(name)} is not a named tensor")
        # A tensor may claim more elements than the file has bytes, by strides of zero.
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            raise WeightsError(f"{file}: tensor {shown(name)} is not laid out in order")
    return loaded


def _refuse_other_archives(file: Path) -> None:
    """Refuse what torch.save does not write: a cut archive, or members that are compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    # A damaged directory also shows as names that are not UTF-8 or versions not implemented.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{file}: is truncated or not an archive of torch.save") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise WeightsError(f"{file}: has compressed members, which torch.save does not write")
