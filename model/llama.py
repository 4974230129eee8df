"""The Llama network from top to bottom: LLaMA 1, 2, 3 and whatever else declares itself one.

One file, read downwards: the network, a block, its attention, its feed-forward part. What tells
the models apart are fields of `ModelConfig`. The reference is transformers' `LlamaForCausalLM`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.backend import Attend
from model.config import ModelConfig
from model.kv_pool import KVPool
from model.layers.linear import ROW_TILE, Linear, choose_tile_sizes
from model.layers.rotary import RotaryEmbedding
from model.network import StepInputs
from model.operations import TORCH, Operations

Read = Callable[[str], Tensor]
"""Give a weight by its Hugging Face name, in the dtype and on the device of the network."""


class LlamaNetwork:
    """Network over torch tensors: the reference on any device, and the CUDA path.

    `operations` says whether torch or Triton computes what lies between the products.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        pool: KVPool,
        max_model_len: int,
        operations: Operations = TORCH,
    ) -> None:
        self._embedding = read("model.embed_tokens.weight")
        self._blocks = [Block(config, read, operations, at) for at in range(config.num_layers)]
        self._norm = AddNorm(config, read, operations, "model.norm")
        head = self._embedding if config.tie_word_embeddings else read("lm_head.weight")
        self._head = Linear(head)
        rotary = RotaryEmbedding(config, max_model_len, self._embedding.device)
        self._attention = operations.attention(config, pool, rotary)
        choose_tile_sizes([self._head, *(each for block in self._blocks for each in block.linears)])

    @property
    def row_tile(self) -> int:
        return ROW_TILE if self._embedding.device.type == "cpu" else 1

    def forward(self, inputs: StepInputs) -> Tensor:
        attend = self._attention.plan(inputs)
        stream = self._embedding[inputs.token_ids]
        delta = None
        for block in self._blocks:
            delta = block(delta, stream, attend)
        return self._norm(delta, stream)

    def warm_up(self) -> None:
        """Run a step that writes nothing, so that kernels which are built at first use are built.

        It has a sequence of one token and one of many: attention has a kernel for each.
        """
        zeros = torch.zeros(3 * ROW_TILE, dtype=torch.int64, device=self._embedding.device)
        inputs = StepInputs(
            token_ids=zeros,
            positions=zeros,
            slots=zeros - 1,
            block_tables=zeros.repeat(2, 1),
            query_starts=[0, 1, len(zeros)],
            seq_lens=[1, len(zeros) - 1],
        )
        self.compute_logits(self.forward(inputs))

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits = self._head(hidden)
        return logits.to(torch.float32) if out is None else out.copy_(logits)


class Block:
    """Attention, then the feed-forward part, each on normalised input and added to the stream.

    What a part adds is handed on as `delta`, so that the addition and the next normalisation are
    one pass over memory.
    """

    def __init__(self, config: ModelConfig, read: Read, operations: Operations, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        self._attention_norm = AddNorm(config, read, operations, prefix + "input_layernorm")
        self._attention = Attention(config, read, layer)
        self._mlp_norm = AddNorm(config, read, operations, prefix + "post_attention_layernorm")
        self._mlp = MLP(config, read, operations, prefix + "mlp.")
        self.linears = [*self._attention.linears, *self._mlp.linears]

    def __call__(self, delta: Tensor | None, stream: Tensor, attend: Attend) -> Tensor:
        """Add delta [T, hidden] to the residual stream in place; return the next delta."""
        delta = self._attention(self._attention_norm(delta, stream), attend)
        return self._mlp(self._mlp_norm(delta, stream))


class AddNorm:
    """Addition to the residual stream, and its normalisation."""

    def __init__(self, config: ModelConfig, read: Read, operations: Operations, name: str) -> None:
        self._add_rms_norm = operations.add_rms_norm
        self._weight = read(name + ".weight")
        self._eps = config.rms_norm_eps

    def __call__(self, delta: Tensor | None, stream: Tensor) -> Tensor:
        """Add delta to the stream [T, hidden] in place; return it normalised."""
        return self._add_rms_norm(delta, stream, self._weight, self._eps)


class Attention:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, read: Read, layer: int) -> None:
        prefix = f"model.layers.{layer}.self_attn."
        self._qkv = read_fused(read, prefix, ("q_proj", "k_proj", "v_proj"), config.attention_bias)
        self._output = read_linear(read, prefix + "o_proj", config.attention_bias)
        self.linears = [self._qkv, self._output]
        self._layer = layer
        self._head_dim = config.head_dim

    def __call__(self, x: Tensor, attend: Attend) -> Tensor:
        """Write K/V of x [T, hidden] and attend to it and to all before it."""
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        return self._output(attend(self._layer, qkv))


class MLP:
    """The feed-forward part: silu(gate x) * up x, then down."""

    def __init__(
        self, config: ModelConfig, read: Read, operations: Operations, prefix: str
    ) -> None:
        self._swiglu = operations.swiglu
        self._gate_up = read_fused(read, prefix, ("gate_proj", "up_proj"), config.mlp_bias)
        self._down = read_linear(read, prefix + "down_proj", config.mlp_bias)
        self.linears = [self._gate_up, self._down]

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [T, hidden] to [T, hidden]."""
        return self._down(self._swiglu(self._gate_up(x)))


def read_linear(read: Read, name: str, has_bias: bool) -> Linear:
    """Read one projection."""
    return Linear(read(name + ".weight"), read(name + ".bias") if has_bias else None)


def read_fused(read: Read, prefix: str, names: tuple[str, ...], has_bias: bool) -> Linear:
    """Read projections of the same input as one, their outputs side by side."""
    weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
    bias = torch.cat([read(f"{prefix}{name}.bias") for name in names]) if has_bias else None
    return Linear(weight, bias)
