"""From load options to a runner that serves: the only wiring inside `model`."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import GenerationDefaults, LoadOptions, ModelConfig
from model.cpu.library import Library
from model.cpu.network import NativeNetwork, Sizes
from model.cpu.threads import available_threads
from model.errors import ConfigError
from model.fp8 import Fp8Rows
from model.graphs import CudaGraphRecorder
from model.kv_pool import KVPool
from model.layers.fp8 import Quantize, scaled_product, why_no_scaled_product
from model.llama import LlamaNetwork
from model.memory import MemoryPlan, plan_memory
from model.network import Network
from model.operations import choose_operations, runs_kernels
from model.precision import DTYPES, KV_DTYPES, Precision, choose_precision, is_in_fp8
from model.runner import ModelRunner
from model.step import Runner, RunnerLimits
from model.tokenizer import Tokenizer
from model.weights.checkpoint import Checkpoint, open_checkpoint
from model.weights.tensors import PackedTensor

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called while weights load, with the bytes done and the bytes in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What would be loaded, known from headers alone."""

    source: str  # the resolved folder or file
    load_format: str
    config: ModelConfig
    precision: Precision
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
    # Imported here: who only measures needs none of the libraries behind it.
    from model.tokenizers import load_tokenizer

    device = _pick_device(options)
    checkpoint = open_checkpoint(options)
    try:
        info = _describe(options, checkpoint, device)
        vocab_size = info.config.vocab_size
        tokenizer = load_tokenizer(checkpoint.tokenizer_path, expected_vocab_size=vocab_size)
        runner = _build_runner(options, info, checkpoint, device, progress)
    finally:
        checkpoint.close()
    return LoadedModel(info=info, runner=runner, tokenizer=tokenizer)


def load_runner(options: LoadOptions) -> tuple[ModelInfo, ModelRunner]:
    """Load a model without its tokenizer: token ids in, token ids out. Raises ModelError."""
    device = _pick_device(options)
    checkpoint = open_checkpoint(options)
    try:
        info = _describe(options, checkpoint, device)
        return info, _build_runner(options, info, checkpoint, device, None)
    finally:
        checkpoint.close()


def _build_runner(
    options: LoadOptions,
    info: ModelInfo,
    checkpoint: Checkpoint,
    device: torch.device,
    progress: Progress | None,
) -> ModelRunner:
    plan, config, precision = info.plan, info.config, info.precision
    weights = _Reader(checkpoint, progress)
    with torch.inference_mode():
        network: Network
        if precision.library:
            network = _native_network(config, precision, plan, weights)
        else:
            network = _torch_network(config, precision, plan, weights, device)
    limits = RunnerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        vocab_size=config.vocab_size,
        max_inflight=2 if device.type == "cuda" else 1,
    )
    if device.type != "cuda":
        return ModelRunner(network, limits, device)
    on_device = runs_kernels(config, device)
    has_graphs = on_device and not options.enforce_eager
    recorder = CudaGraphRecorder(device) if has_graphs else None
    runner = ModelRunner(network, limits, device, decodes_on_device=on_device, recorder=recorder)
    runner.warm_up()
    _check_plan(plan, device)
    return runner


def _check_plan(plan: MemoryPlan, device: torch.device) -> None:
    """Say in the log what has been taken of what was planned; graphs come later."""
    taken, planned = torch.cuda.memory_reserved(device), plan.planned_bytes
    level = logging.INFO if taken <= planned else logging.WARNING
    logger.log(level, "%d MiB of the card's memory taken, %d planned", taken >> 20, planned >> 20)


class _Reader:
    """Reads a checkpoint's tensors and tells how far it has come."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress | None) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._num_done = 0

    @property
    def has_blocks(self) -> bool:
        return self._checkpoint.has_blocks

    def read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        self._count(name)
        return tensor

    def packed(self, name: str) -> PackedTensor | None:
        packed = self._checkpoint.packed(name)
        if packed is not None:
            self._count(name)
        return packed

    def fp8(self, name: str, device: torch.device, quantize: Quantize) -> Fp8Rows:
        """Return a matrix in fp8 on a device: as the file has it, or quantised there."""
        store = self._checkpoint.fp8
        rows = store.rows(name) if store else None
        if rows is None:
            return quantize(self.read(name).to(device).contiguous())
        self._count(name)
        return Fp8Rows(rows.codes.to(device), rows.scales.to(device))

    def is_in_fp8(self, name: str) -> bool:
        return is_in_fp8(self._checkpoint, name)

    def kv_scales(self) -> list[tuple[float, float]]:
        """Return the scales of keys and values that an FP8 checkpoint brings; empty for others."""
        return self._checkpoint.fp8.kv_scales() if self._checkpoint.fp8 else []

    def _count(self, name: str) -> None:
        self._num_done += self._checkpoint.stored_bytes(name)
        if self._progress is not None:
            num_bytes = self._checkpoint.num_bytes
            self._progress(min(self._num_done, num_bytes), num_bytes)


def _torch_network(
    config: ModelConfig,
    precision: Precision,
    plan: MemoryPlan,
    weights: _Reader,
    device: torch.device,
) -> LlamaNetwork:
    dtype = DTYPES[precision.dtype]
    pool = KVPool(
        config,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        dtype=KV_DTYPES[precision.kv_cache_dtype],
        device=device,
    )
    if precision.kv_cache_dtype == "fp8" and (scales := weights.kv_scales()):
        pool.key_scales, pool.value_scales = map(list, zip(*scales, strict=True))
    operations = choose_operations(config, device, precision.is_batch_invariant)
    is_fp8 = precision.quantization == "fp8"
    is_torchs = operations.fp8.product is scaled_product
    if is_fp8 and is_torchs and (reason := why_no_scaled_product(device)):
        raise ConfigError(f"--quantization fp8: torch {torch.__version__} lacks it here: {reason}")

    def read(name: str) -> Tensor:
        return weights.read(name).to(device=device, dtype=dtype).contiguous()

    def read_fp8(name: str) -> Fp8Rows | None:
        if not (is_fp8 and weights.is_in_fp8(name)):
            return None
        return weights.fp8(name, device, operations.fp8.quantize)

    network = LlamaNetwork(config, read, pool, plan.max_model_len, operations, read_fp8)
    if device.type == "cuda":
        network.warm_up()
    return network


def _native_network(
    config: ModelConfig, precision: Precision, plan: MemoryPlan, weights: _Reader
) -> NativeNetwork:
    assert precision.library is not None
    assert precision.quantization != "fp8"
    library = Library(precision.library, available_threads())
    # What torch still does is small, and its own waiting threads would hold up the native ones.
    torch.set_num_threads(1)
    return NativeNetwork(
        config,
        weights,
        library,
        scheme=precision.quantization,
        kv_dtype=KV_DTYPES[precision.kv_cache_dtype],
        sizes=Sizes(
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_model_len=plan.max_model_len,
            max_tokens=plan.max_num_batched_tokens,
        ),
    )


def _describe(options: LoadOptions, checkpoint: Checkpoint, device: torch.device) -> ModelInfo:
    config = checkpoint.config
    precision = choose_precision(options, checkpoint, device)
    numerics = f"{checkpoint.fingerprint} {precision.name} {device.type} {torch.__version__}"
    return ModelInfo(
        source=str(checkpoint.source),
        load_format=checkpoint.load_format,
        config=config,
        precision=precision,
        generation=checkpoint.generation,
        eos_token_ids=checkpoint.eos_token_ids,
        plan=plan_memory(
            options, config, precision, device, runs_kernels=runs_kernels(config, device)
        ),
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
        raise ConfigError(f"--device {options.device}: torch sees no CUDA device; use --device cpu")
    return device
