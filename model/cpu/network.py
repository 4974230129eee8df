"""A Llama whose step runs natively, in one call without the interpreter.

Which matrix is stored how is decided here. With int8 everything runs in a rotated basis, whose
hidden states are rotated back before they leave; with int4 the blocks of a GGUF file are taken
as they are, and what is not in 4 bits there is kept in 8.
"""

import math
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.cpu.library import (
    BLOCK_TYPES,
    KV_KINDS,
    MAX_HEAD_DIM,
    TILE,
    Layer,
    Library,
    Matrix,
    Model,
    RotationTable,
    Step,
    int32_array,
    pointer,
)
from model.cpu.matrices import (
    FLOAT32,
    INT8,
    INT8_BY_32,
    INT8_BY_64,
    STEPS_BY_64,
    STEPS_BY_128,
    Arena,
    Form,
    Packer,
    Rotation,
)
from model.cpu.memory import GrowingMemory
from model.errors import ConfigError
from model.kv_pool import INT8_SCALE_BYTES
from model.layers.rotary import RotaryEmbedding
from model.network import StepInputs
from model.weights.tensors import EMBEDDING, HEAD, NORM, PackedTensor

Quantization = Literal["none", "int8", "int4"]
ROTATION_SEED = 0x6172726965726F
READY_TOKENS = 4096  # whose K/V has pages before they are used


class Weights(Protocol):
    """Where weights come from, by Hugging Face's names."""

    @property
    def has_blocks(self) -> bool:
        """Whether any matrix is packed."""
        ...

    def read(self, name: str) -> Tensor: ...

    def packed(self, name: str) -> PackedTensor | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is allocated beside the weights."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_tokens: int  # of a step


class NativeNetwork:
    """Network over the C library; owns weights and K/V."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        library: Library,
        *,
        scheme: Quantization,
        kv_dtype: torch.dtype,
        sizes: Sizes,
    ) -> None:
        check_support(config, sizes.block_size)
        self._config = config
        self._max_tokens = sizes.max_tokens
        self._arena = Arena()
        num_tiles = sizes.num_blocks * sizes.block_size // TILE
        self._memory, self._pool = _kv_pool(config, num_tiles, kv_dtype)
        rotary = RotaryEmbedding(config, sizes.max_model_len, torch.device("cpu"))
        self._cos, self._sin = rotary.half_tables()
        loader = _Loader(config, weights, library, self._arena, scheme)
        self._layers = (Layer * config.num_layers)(
            *(loader.layer(i, self._pool[:, i]) for i in range(config.num_layers))
        )
        embedding, head = loader.embedding_and_head()
        model = Model(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=sizes.block_size,
            kv_kind=KV_KINDS[kv_dtype],
            max_tokens=sizes.max_tokens,
            kv_stride=self._pool.stride(0),
            kv_head_stride=_kv_head_size(config, kv_dtype),
            norm_eps=config.rms_norm_eps,
            final_norm=loader.vector(NORM),
            cos=pointer(self._cos),
            sin=pointer(self._sin),
            layers=self._layers,
            embedding=embedding,
            head=head,
            rotation=loader.rotation.table if loader.rotation else RotationTable(),
        )
        self._library = library  # whose threads the engine uses
        self._engine = library.create_engine(model)
        self._logits = torch.empty(0, config.vocab_size)  # pages that are not new every step

    @property
    def row_tile(self) -> int:
        return 1

    @property
    def weights_bytes(self) -> int:
        """Bytes of packed weights, scales, norms and biases."""
        return self._arena.num_bytes

    def forward(self, inputs: StepInputs) -> Tensor:
        num_tokens = inputs.token_ids.shape[0]
        assert num_tokens <= self._max_tokens
        hidden = torch.empty(num_tokens, self._config.hidden_size)
        tables = inputs.block_tables.contiguous()
        num_tiles = int(inputs.slots.max()) // TILE + 1
        self._memory.use(num_tiles * self._pool.stride(0) * self._pool.element_size())
        step = Step(
            num_tokens=num_tokens,
            num_sequences=len(inputs.seq_lens),
            blocks_per_sequence=tables.shape[1],
            token_ids=pointer(inputs.token_ids),
            positions=pointer(inputs.positions),
            slots=pointer(inputs.slots),
            block_tables=pointer(tables),
            query_starts=int32_array(inputs.query_starts),
        )
        self._engine.forward(step, hidden)
        return hidden

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            if hidden.shape[0] > len(self._logits):
                self._logits = torch.empty(hidden.shape[0], self._config.vocab_size)
            out = self._logits[: hidden.shape[0]]
        for start in range(0, hidden.shape[0], self._max_tokens):
            stop = start + self._max_tokens
            self._engine.logits(hidden[start:stop].contiguous(), out[start:stop])
        return out


def check_support(config: ModelConfig, block_size: int) -> None:
    """Refuse what the native step cannot run. Raises ConfigError."""
    if block_size % TILE:
        raise ConfigError(f"--block-size {block_size}: the CPU needs a multiple of {TILE}")
    if config.head_dim > MAX_HEAD_DIM:
        raise ConfigError(f"head_dim {config.head_dim} is more than the CPU's {MAX_HEAD_DIM}")


class _Loader:
    """Reads one model's weights in one scheme."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        library: Library,
        arena: Arena,
        scheme: Quantization,
    ) -> None:
        self._config = config
        self._weights = weights
        self._arena = arena
        self._scheme = scheme
        self._packer = Packer(library, arena)
        self.rotation: Rotation | None = None
        if scheme == "int8":
            self.rotation = Rotation(library, arena, config.hidden_size, ROTATION_SEED)

    def vector(self, name: str) -> c_void_p:
        """Keep a norm's weight [hidden]."""
        return pointer(self._arena.keep(self._weights.read(name).to(torch.float32)))

    def layer(self, index: int, kv: Tensor) -> Layer:
        prefix = f"model.layers.{index}."
        config = self._config
        attention_norm = prefix + "input_layernorm.weight"
        mlp_norm = prefix + "post_attention_layernorm.weight"
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        layer = Layer(
            query=self._reader(attention + "q_proj", attention_norm, config.attention_bias),
            key=self._reader(attention + "k_proj", attention_norm, config.attention_bias),
            value=self._reader(attention + "v_proj", attention_norm, config.attention_bias),
            output=self._writer(attention + "o_proj", config.attention_bias),
            gate=self._reader(mlp + "gate_proj", mlp_norm, config.mlp_bias),
            up=self._reader(mlp + "up_proj", mlp_norm, config.mlp_bias),
            down=self._writer(mlp + "down_proj", config.mlp_bias),
            keys=kv[:, 0].data_ptr(),
            values=kv[:, 1].data_ptr(),
        )
        if self.rotation is None:
            layer.attention_norm = self.vector(attention_norm)
            layer.mlp_norm = self.vector(mlp_norm)
        return layer

    def embedding_and_head(self) -> tuple[Matrix, Matrix]:
        embedding = self._table(EMBEDDING)
        if self._config.tie_word_embeddings:
            return embedding, embedding
        return embedding, self._table(HEAD)

    def _table(self, name: str) -> Matrix:
        """The embedding or the head: both read and write the residual stream row by row."""
        if self.rotation is not None:
            return self._packer.pack(self._weights.read(name), INT8, inputs=self.rotation)
        return self._plain(name, None)

    def _reader(self, name: str, norm: str, has_bias: bool) -> Matrix:
        """A projection that reads the normalised stream; rotated, the norm is folded into it."""
        bias = self._weights.read(name + ".bias") if has_bias else None
        if self.rotation is None:
            return self._plain(name + ".weight", bias)
        weight = self._weights.read(name + ".weight")
        factors = self._weights.read(norm).to(torch.float32)
        return self._packer.pack(weight, INT8, bias, columns=factors, inputs=self.rotation)

    def _writer(self, name: str, has_bias: bool) -> Matrix:
        """A projection that adds to the stream. Its own inputs are not rotated, hence groups."""
        bias = self._weights.read(name + ".bias") if has_bias else None
        if self.rotation is None:
            return self._plain(name + ".weight", bias)
        weight = self._weights.read(name + ".weight")
        rotated_bias = None if bias is None else self.rotation.rows(bias[None])[0]
        return self._packer.pack(weight, INT8_BY_64, rotated_bias, outputs=self.rotation)

    def _plain(self, name: str, bias: Tensor | None) -> Matrix:
        if self._scheme == "none":
            return self._packer.pack(self._weights.read(name), FLOAT32, bias)
        packed = self._weights.packed(name)
        if packed is not None and packed.type in BLOCK_TYPES:
            return self._packer.repack(packed, bias)
        values = self._weights.read(name)
        return self._packer.pack(values, self._int4_form(name, values.shape[1]), bias)

    def _int4_form(self, name: str, cols: int) -> Form:
        """How int4 stores what comes as numbers. Matrices with the same input share its groups."""
        if self._weights.has_blocks or name in (EMBEDDING, HEAD):
            return INT8_BY_32  # as wide as the groups of blocks
        return STEPS_BY_64 if cols % 128 else STEPS_BY_128


def _kv_pool(
    config: ModelConfig, num_tiles: int, dtype: torch.dtype
) -> tuple[GrowingMemory, Tensor]:
    """Return the K/V pool [tiles, layers, 2, K * head size] and what it lies in.

    Tiles are outermost, so that a few tokens touch few pages, large ones included.
    """
    part = config.num_kv_heads * _kv_head_size(config, dtype)
    shape = (num_tiles, config.num_layers, 2, part)
    tile_bytes = math.prod(shape[1:]) * dtype.itemsize
    memory = GrowingMemory(num_tiles * tile_bytes, READY_TOKENS // TILE * tile_bytes)
    return memory, memory.tensor.view(dtype).view(shape)


def _kv_head_size(config: ModelConfig, dtype: torch.dtype) -> int:
    """Elements of one head in a tile: D * 16, and in 8 bits a float32 scale for each token."""
    scales = INT8_SCALE_BYTES if dtype == torch.int8 else 0
    return (config.head_dim + scales) * TILE
