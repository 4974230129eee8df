"""From load options to a runner that serves: the only wiring inside `model`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import GenerationDefaults, LoadOptions, ModelConfig
from model.errors import ConfigError
from model.kv_pool import KVPool
from model.llama import LlamaNetwork
from model.memory import MemoryPlan, plan_memory
from model.runner import ModelRunner
from model.step import Runner, RunnerLimits
from model.tokenizer import Tokenizer
from model.tokenizers import load_tokenizer
from model.weights.checkpoint import Checkpoint, open_checkpoint

Progress = Callable[[int, int], None]
"""Called while weights load, with the bytes done and the bytes in all."""

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


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
    checkpoint = open_checkpoint(options)
    try:
        return _describe(options, checkpoint, _pick_device(options))
    finally:
        checkpoint.close()


def load_model(options: LoadOptions, progress: Progress | None = None) -> LoadedModel:
    """Load weights and tokenizer, build the K/V pool and the runner. Raises ModelError."""
    device = _pick_device(options)
    checkpoint = open_checkpoint(options)
    try:
        info = _describe(options, checkpoint, device)
        vocab_size = info.config.vocab_size
        tokenizer = load_tokenizer(checkpoint.tokenizer_path, expected_vocab_size=vocab_size)
        runner = _build_runner(info, checkpoint, device, progress)
    finally:
        checkpoint.close()
    return LoadedModel(info=info, runner=runner, tokenizer=tokenizer)


def _build_runner(
    info: ModelInfo, checkpoint: Checkpoint, device: torch.device, progress: Progress | None
) -> ModelRunner:
    plan, config, dtype = info.plan, info.config, DTYPES[info.dtype]
    num_done = 0

    def read(name: str) -> Tensor:
        nonlocal num_done
        tensor = checkpoint.read(name).to(device=device, dtype=dtype).contiguous()
        num_done += checkpoint.stored_bytes(name)
        if progress is not None:
            progress(num_done, checkpoint.num_bytes)
        return tensor

    pool = KVPool(
        config,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        dtype=dtype,
        device=device,
    )
    with torch.inference_mode():
        network = LlamaNetwork(config, read, pool, plan.max_model_len)
    limits = RunnerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        vocab_size=config.vocab_size,
        max_inflight=2 if device.type == "cuda" else 1,
    )
    return ModelRunner(network, limits, device)


def _describe(options: LoadOptions, checkpoint: Checkpoint, device: torch.device) -> ModelInfo:
    config = checkpoint.config
    dtype = _pick_dtype(options, config, device)
    numerics = f"{checkpoint.fingerprint} {dtype} {device.type} {torch.__version__}"
    return ModelInfo(
        source=str(checkpoint.source),
        load_format=checkpoint.load_format,
        config=config,
        dtype=dtype,
        generation=checkpoint.generation,
        eos_token_ids=checkpoint.eos_token_ids,
        plan=plan_memory(options, config, DTYPES[dtype], device),
        fingerprint="fp_" + hashlib.sha256(numerics.encode()).hexdigest()[:12],
    )


def _pick_device(options: LoadOptions) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise ConfigError(f"--device {options.device} is not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {options.device}: only cpu and cuda are served")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: torch sees no CUDA device")
    return device


def _pick_dtype(options: LoadOptions, config: ModelConfig, device: torch.device) -> str:
    """Take the checkpoint's own on a GPU; on a CPU float32, which is exact and no slower."""
    if options.dtype == "auto":
        if device.type == "cpu":
            return "float32"
        return "bfloat16" if config.dtype == "float32" else config.dtype
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: choose one of auto, {', '.join(DTYPES)}")
    return str(DTYPES[options.dtype]).removeprefix("torch.")
