"""The shape of a Llama model, wherever it was read from. Torch-free.

The readers of config.json, params.json and GGUF headers live in `model/weights`; all of them
end in `ModelConfig`, whose `validate` refuses what cannot be built before anything is allocated.
"""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; fields beyond `theta` belong to the scaled kinds only."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that tells one Llama from another."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"  # of the checkpoint: float32, float16 or bfloat16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults that a model's generation_config.json asks for; None: OpenAI's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


LoadFormat = Literal["auto", "safetensors", "gguf", "meta", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to load, where, and how much memory it may take; named after vLLM's flags."""

    model: str  # a folder, a .gguf file or a hub id
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = None
    offline: bool = False
    load_format: LoadFormat = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    generation_config: Literal["auto", "vllm"] = "auto"
    seed: int = 0  # of dummy weights
