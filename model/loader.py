"""From load options to a runner that serves: the only wiring inside `model`."""

from collections.abc import Callable
from dataclasses import dataclass

from model.config import GenerationDefaults, LoadOptions, ModelConfig
from model.step import Runner
from model.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called while weights load, with the bytes done and the bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the bytes go; printed at start-up and by `arriero info`."""

    device: str
    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int  # activations and logits of the largest step
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What would be loaded, known from headers alone."""

    source: str  # the resolved folder or file
    load_format: str
    config: ModelConfig
    dtype: str
    generation: GenerationDefaults
    eos_token_ids: tuple[int, ...]
    plan: MemoryPlan
    fingerprint: str  # of weights and numerics: system_fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to serve."""

    info: ModelInfo
    runner: Runner
    tokenizer: Tokenizer


def inspect_model(options: LoadOptions) -> ModelInfo:
    """Read headers and plan memory without loading weights. Raises ModelError."""
    raise NotImplementedError


def load_model(options: LoadOptions, progress: Progress | None = None) -> LoadedModel:
    """Load weights and tokenizer, build the K/V pool and the runner. Raises ModelError."""
    raise NotImplementedError
