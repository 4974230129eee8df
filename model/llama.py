"""The Llama network from top to bottom: LLaMA 1, 2, 3 and whatever else declares itself one.

One file, read downwards: the network, a block, its attention, its feed-forward part. What tells
the models apart are fields of `ModelConfig`. The reference is transformers' `LlamaForCausalLM`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.paged import AttentionPlan, PagedAttention
from model.config import ModelConfig
from model.kv_pool import KVPool
from model.layers.activation import swiglu
from model.layers.linear import ROW_TILE, Linear, choose_tile_sizes
from model.layers.norm import RMSNorm
from model.layers.rotary import RotaryEmbedding, rotate
from model.network import StepInputs

Read = Callable[[str], Tensor]
"""Give a weight by its Hugging Face name, in the dtype and on the device of the network."""


class LlamaNetwork:
    """Network over torch tensors: the reference on any device, and the CUDA path."""

    def __init__(self, config: ModelConfig, read: Read, pool: KVPool, max_model_len: int) -> None:
        self._paged = PagedAttention(config, pool)
        self._embedding = read("model.embed_tokens.weight")
        self._blocks = [
            Block(config, read, self._paged, layer) for layer in range(config.num_layers)
        ]
        self._norm = RMSNorm(read("model.norm.weight"), config.rms_norm_eps)
        head = self._embedding if config.tie_word_embeddings else read("lm_head.weight")
        self._head = Linear(head)
        self._rotary = RotaryEmbedding(config, max_model_len, self._embedding.device)
        choose_tile_sizes([self._head, *(each for block in self._blocks for each in block.linears)])

    @property
    def row_tile(self) -> int:
        return ROW_TILE

    def forward(self, inputs: StepInputs) -> Tensor:
        plan = self._paged.plan(inputs)
        x = self._embedding[inputs.token_ids]
        rotation = self._rotary.gather(inputs.positions, x.dtype)
        for block in self._blocks:
            x = block(x, rotation, plan)
        return self._norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).to(torch.float32)


class Block:
    """Attention, then the feed-forward part, each on normalised input and added to the stream."""

    def __init__(self, config: ModelConfig, read: Read, paged: PagedAttention, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        eps = config.rms_norm_eps
        self._attention_norm = RMSNorm(read(prefix + "input_layernorm.weight"), eps)
        self._attention = Attention(config, read, paged, layer)
        self._mlp_norm = RMSNorm(read(prefix + "post_attention_layernorm.weight"), eps)
        self._mlp = MLP(config, read, prefix + "mlp.")
        self.linears = [*self._attention.linears, *self._mlp.linears]

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        """Map the residual stream [T, hidden] to the next block's."""
        x = x + self._attention(self._attention_norm(x), rotation, plan)
        return x + self._mlp(self._mlp_norm(x))


class Attention:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, read: Read, paged: PagedAttention, layer: int) -> None:
        prefix = f"model.layers.{layer}.self_attn."
        self._qkv = read_fused(read, prefix, ("q_proj", "k_proj", "v_proj"), config.attention_bias)
        self._output = read_linear(read, prefix + "o_proj", config.attention_bias)
        self.linears = [self._qkv, self._output]
        self._paged = paged
        self._layer = layer
        self._head_dim = config.head_dim
        self._splits = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        """Write K/V of x [T, hidden] and attend to it and to all before it."""
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        queries, keys, values = torch.split(qkv, self._splits, dim=1)
        queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        attended = self._paged.attend(self._layer, queries, keys, values, plan)
        return self._output(attended.flatten(1))


class MLP:
    """The feed-forward part: silu(gate x) * up x, then down."""

    def __init__(self, config: ModelConfig, read: Read, prefix: str) -> None:
        self._gate_up = read_fused(read, prefix, ("gate_proj", "up_proj"), config.mlp_bias)
        self._down = read_linear(read, prefix + "down_proj", config.mlp_bias)
        self.linears = [self._gate_up, self._down]

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [T, hidden] to [T, hidden]."""
        return self._down(swiglu(self._gate_up(x)))


def read_linear(read: Read, name: str, has_bias: bool) -> Linear:
    """Read one projection."""
    return Linear(read(name + ".weight"), read(name + ".bias") if has_bias else None)


def read_fused(read: Read, prefix: str, names: tuple[str, ...], has_bias: bool) -> Linear:
    """Read projections of the same input as one, their outputs side by side."""
    weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
    bias = torch.cat([read(f"{prefix}{name}.bias") for name in names]) if has_bias else None
    return Linear(weight, bias)
