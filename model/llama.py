"""The Llama network from top to bottom: LLaMA 1, 2, 3 and whatever else declares itself one.

One file, read downwards: the network, a block, its attention, its feed-forward part. What tells
the models apart are fields of `ModelConfig`. The reference is transformers' `LlamaForCausalLM`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.attention.backend import Attend
from model.config import ModelConfig
from model.fp8 import Activations, Fp8Rows
from model.kv_pool import KVPool
from model.layers.fp8 import Fp8Linear
from model.layers.linear import ROW_TILE, Linear, choose_tile_sizes
from model.layers.rotary import RotaryEmbedding
from model.network import StepInputs
from model.operations import TORCH, Operations

Read = Callable[[str], Tensor]
"""Give a weight by its Hugging Face name, in the dtype and on the device of the network."""
ReadFp8 = Callable[[str], Fp8Rows | None]
"""Give a projection's weight in fp8 on that device; None where it is not to be in fp8."""


class LlamaNetwork:
    """Network over torch tensors: the reference on any device, and the CUDA path.

    `operations` says whether torch or Triton computes what lies between the products. Projections
    that `read_fp8` gives are multiplied in fp8; embedding, norms and head never are.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        pool: KVPool,
        max_model_len: int,
        operations: Operations = TORCH,
        read_fp8: ReadFp8 | None = None,
    ) -> None:
        self._embedding = read("model.embed_tokens.weight")
        projections = Projections(read, read_fp8, operations, self._embedding.dtype)
        self._blocks = [
            Block(config, read, projections, operations, at) for at in range(config.num_layers)
        ]
        self._norm = read("model.norm.weight")
        self._eps = config.rms_norm_eps
        self._add_rms_norm = operations.add_rms_norm
        head = self._embedding if config.tie_word_embeddings else read("lm_head.weight")
        self._head = Linear(head, product=operations.product)
        rotary = RotaryEmbedding(config, max_model_len, self._embedding.device)
        self._attention = operations.attention(config, pool, rotary)
        choose_tile_sizes([self._head, *projections.linears])

    @property
    def row_tile(self) -> int:
        return ROW_TILE if self._embedding.device.type == "cpu" else 1

    def forward(self, inputs: StepInputs) -> Tensor:
        attend = self._attention.plan(inputs)
        stream = self._embedding[inputs.token_ids]
        delta = None
        for block in self._blocks:
            delta = block(delta, stream, attend)
        return self._add_rms_norm(delta, stream, self._norm, self._eps)

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

    def __init__(
        self,
        config: ModelConfig,
        read: Read,
        projections: "Projections",
        operations: Operations,
        layer: int,
    ) -> None:
        prefix = f"model.layers.{layer}."
        self._attention = Attention(config, projections, layer)
        self._mlp = MLP(config, projections, operations, prefix + "mlp.")
        eps = config.rms_norm_eps
        weight = read(prefix + "input_layernorm.weight")
        self._attention_norm = AddNorm(weight, eps, operations, self._attention.qkv)
        weight = read(prefix + "post_attention_layernorm.weight")
        self._mlp_norm = AddNorm(weight, eps, operations, self._mlp.gate_up)

    def __call__(self, delta: Tensor | None, stream: Tensor, attend: Attend) -> Tensor:
        """Add delta [T, hidden] to the residual stream in place; return the next delta."""
        delta = self._attention(self._attention_norm(delta, stream), attend)
        return self._mlp(self._mlp_norm(delta, stream))


class AddNorm:
    """Addition to the residual stream, and its normalisation, in the form that a product takes."""

    def __init__(
        self, weight: Tensor, eps: float, operations: Operations, feeds: Linear | Fp8Linear
    ) -> None:
        is_fp8 = isinstance(feeds, Fp8Linear)
        self._add_rms_norm = operations.fp8.add_rms_norm if is_fp8 else operations.add_rms_norm
        self._weight = weight
        self._eps = eps

    def __call__(self, delta: Tensor | None, stream: Tensor) -> Activations:
        """Add delta to the stream [T, hidden] in place; return it normalised."""
        return self._add_rms_norm(delta, stream, self._weight, self._eps)


class Attention:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, projections: "Projections", layer: int) -> None:
        prefix = f"model.layers.{layer}.self_attn."
        self.qkv = projections.read(prefix, ("q_proj", "k_proj", "v_proj"), config.attention_bias)
        self._output = projections.read(prefix, ("o_proj",), config.attention_bias)
        self._layer = layer
        self._head_dim = config.head_dim

    def __call__(self, x: Activations, attend: Attend) -> Tensor:
        """Write K/V of x [T, hidden] and attend to it and to all before it."""
        qkv = self.qkv(x)
        return self._output(attend(self._layer, qkv.view(qkv.shape[0], -1, self._head_dim)))


class MLP:
    """The feed-forward part: silu(gate x) * up x, then down."""

    def __init__(
        self, config: ModelConfig, projections: "Projections", operations: Operations, prefix: str
    ) -> None:
        self.gate_up = projections.read(prefix, ("gate_proj", "up_proj"), config.mlp_bias)
        self._down = projections.read(prefix, ("down_proj",), config.mlp_bias)
        is_fp8 = isinstance(self._down, Fp8Linear)
        self._swiglu = operations.fp8.swiglu if is_fp8 else operations.swiglu

    def __call__(self, x: Activations) -> Tensor:
        """Map x [T, hidden] to [T, hidden]."""
        return self._down(self._swiglu(self.gate_up(x)))


class Projections:
    """Reads the matrices of the blocks, those with the same input as one, outputs side by side."""

    def __init__(
        self, read: Read, read_fp8: ReadFp8 | None, operations: Operations, dtype: torch.dtype
    ) -> None:
        self._read = read
        self._read_fp8 = read_fp8
        self._dtype = dtype
        self._operations = operations
        self.linears: list[Linear] = []  # those that are not in fp8

    def read(self, prefix: str, names: tuple[str, ...], has_bias: bool) -> Linear | Fp8Linear:
        """Read one or several; in fp8 if each of them is."""
        bias = None
        if has_bias:
            bias = torch.cat([self._read(f"{prefix}{name}.bias") for name in names])
        weights = [f"{prefix}{name}.weight" for name in names]
        if (rows := self._fp8_rows(weights)) is not None:
            fp8 = self._operations.fp8
            return Fp8Linear(
                rows, bias, dtype=self._dtype, quantize=fp8.quantize, product=fp8.product
            )
        weight = torch.cat([self._read(name) for name in weights])
        self.linears.append(Linear(weight, bias, self._operations.product))
        return self.linears[-1]

    def _fp8_rows(self, weights: list[str]) -> Fp8Rows | None:
        """Read matrices in fp8 as one; None if one of them is not."""
        parts = []
        for name in weights:
            part = self._read_fp8(name) if self._read_fp8 else None
            if part is None:
                return None
            parts.append(part)
        codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        return Fp8Rows(codes, scales)
