"""Which arithmetic a model runs in: what `--dtype`, `--quantization` and `--kv-cache-dtype` mean.

One static table, written out in docs/quantization.md: device and file format give the scheme,
and nothing is measured or guessed at start-up.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model.config import LoadOptions, ModelConfig
from model.cpu.build import NativeUnavailable, find_library, machine_level
from model.cpu.network import Quantization, check_support
from model.errors import ConfigError
from model.fp8 import FP8
from model.layers.fp8 import CAPABILITY, SIDE
from model.weights.checkpoint import Checkpoint
from model.weights.fp8 import FP8_CODES
from model.weights.tensors import required_tensors

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
KV_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": FP8}
_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The numbers that a model is made of. `library` runs them; without it torch does."""

    quantization: Quantization | Literal["fp8"]
    dtype: str  # of what is not quantised
    kv_cache_dtype: str
    weights_bytes: int
    library: Path | None = None
    level: str = ""  # of the library's instructions
    is_batch_invariant: bool = False  # by Triton's products; what a CPU runs always is

    @property
    def name(self) -> str:
        """The scheme in a few words, for logs, `/v1/models` and the fingerprint."""
        weights = self.dtype if self.quantization == "none" else self.quantization
        runs_on = f"native {self.level}" if self.library else "torch"
        invariant = ", batch-invariant" if self.is_batch_invariant else ""
        return f"{weights}, {self.kv_cache_dtype} K/V, {runs_on}{invariant}"


def choose_precision(
    options: LoadOptions, checkpoint: Checkpoint, device: torch.device
) -> Precision:
    """Read the table. Raises ConfigError for what does not go together."""
    config = checkpoint.config
    quantization = _pick_quantization(options, checkpoint, device)
    if quantization == "fp8":
        return _in_torch(options, checkpoint, device, "bfloat16", is_fp8=True)
    dtype = "float32" if quantization != "none" else _pick_dtype(options, config, device)
    if device.type == "cpu" and dtype == "float32":
        try:
            check_support(config, options.block_size)
            library = find_library(Path(options.cache_dir))
        except (ConfigError, NativeUnavailable) as error:
            if options.quantization in ("int8", "int4"):
                raise
            logger.warning("no native CPU step, float32 in torch instead: %s", error)
        else:
            return _native(options, checkpoint, quantization, library)
    return _in_torch(options, checkpoint, device, dtype)


def is_in_fp8(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a model that runs in fp8 has this tensor in it.

    A projection has, if its sides fit and the file does not keep it in 16 bits beside others in
    fp8. Embedding and head never have: they are a small part of a step and cost most in quality.
    """
    shape = required_tensors(checkpoint.config)[name]
    if not name.endswith("_proj.weight") or any(size % SIDE for size in shape):
        return False
    return checkpoint.fp8 is None or checkpoint.store.infos[name].dtype == FP8_CODES


def _in_torch(
    options: LoadOptions,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: str,
    is_fp8: bool = False,
) -> Precision:
    config = checkpoint.config
    weights_bytes = config.num_parameters * DTYPES[dtype].itemsize
    if is_fp8:
        for name, shape in required_tensors(config).items():
            if is_in_fp8(checkpoint, name):
                rows, columns = shape
                weights_bytes += rows * (columns + 4) - rows * columns * DTYPES[dtype].itemsize
    return Precision(
        quantization="fp8" if is_fp8 else "none",
        dtype=dtype,
        kv_cache_dtype=_pick_kv_dtype(options, (dtype, "fp8")),
        weights_bytes=weights_bytes,
        is_batch_invariant=options.batch_invariant and device.type == "cuda",
    )


def _native(
    options: LoadOptions, checkpoint: Checkpoint, quantization: Quantization, library: Path
) -> Precision:
    kv_dtypes = ("int8", "float16", "float32")
    if quantization == "none":
        kv_dtypes = ("float32", "float16", "int8")
    return Precision(
        quantization=quantization,
        dtype="float32",
        kv_cache_dtype=_pick_kv_dtype(options, kv_dtypes),
        weights_bytes=_packed_bytes(checkpoint, quantization),
        library=library,
        level=machine_level(),
    )


def _pick_quantization(
    options: LoadOptions, checkpoint: Checkpoint, device: torch.device
) -> Quantization | Literal["fp8"]:
    wanted = options.quantization
    if wanted == "fp8":
        if reason := _why_not_fp8(device):
            raise ConfigError(f"--quantization fp8: {reason}")
        if options.dtype not in ("auto", "bfloat16"):
            raise ConfigError(f"--quantization fp8 and --dtype {options.dtype}: it is bfloat16")
        return wanted
    if wanted in ("int8", "int4"):
        if device.type != "cpu":
            raise ConfigError(f"--quantization {wanted}: only --device cpu has it; a GPU has fp8")
        if options.dtype != "auto":
            raise ConfigError(f"--quantization {wanted} and --dtype {options.dtype}: choose one")
        return wanted
    if wanted == "none" or options.dtype != "auto":
        return "none"
    if device.type == "cpu":
        return _of_file(checkpoint)
    if checkpoint.fp8 is None:
        return "none"
    if reason := _why_not_fp8(device):
        logger.warning("the file's fp8 is served as %s: %s", checkpoint.config.dtype, reason)
        return "none"
    return "fp8"


def _of_file(checkpoint: Checkpoint) -> Quantization:
    """Choose for a CPU: as many bits as most matrices of the file have."""
    types = [info.dtype for info in checkpoint.store.infos.values() if len(info.shape) == 2]
    is_in_4_bits = 2 * sum(each in _FOUR_BITS for each in types) > len(types)
    return "int4" if is_in_4_bits else "int8"


def _why_not_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "only --device cuda has it; a CPU has int8"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"needs a card of compute capability 8.9 or more, this one has {major}.{minor}"
    return None


def _pick_kv_dtype(options: LoadOptions, possible: tuple[str, ...]) -> str:
    if options.kv_cache_dtype == "auto":
        return possible[0]
    if options.kv_cache_dtype not in possible:
        raise ConfigError(
            f"--kv-cache-dtype {options.kv_cache_dtype}: here it can be {' or '.join(possible)}"
        )
    return options.kv_cache_dtype


def _pick_dtype(options: LoadOptions, config: ModelConfig, device: torch.device) -> str:
    """Take the checkpoint's own on a GPU; on a CPU float32, which is exact and no slower."""
    if options.dtype == "auto":
        if device.type == "cpu":
            return "float32"
        return "bfloat16" if config.dtype == "float32" else config.dtype
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: choose one of auto, {', '.join(DTYPES)}")
    return str(DTYPES[options.dtype]).removeprefix("torch.")


def _packed_bytes(checkpoint: Checkpoint, quantization: Quantization) -> int:
    """Sum the packed sizes of all tensors, scales included; see model/cpu/matrices.py."""
    total = 0
    for name, shape in required_tensors(checkpoint.config).items():
        if len(shape) == 1:
            total += shape[0] * 4
            continue
        stored = checkpoint.store.infos[name].dtype
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if quantization == "none":
            bits = 32.0
        elif quantization == "int8":
            bits = 8.0 if "o_proj" not in name and "down_proj" not in name else 8.25
        elif stored in _FOUR_BITS:
            bits = 5.0
        elif checkpoint.has_blocks or is_table:
            bits = 8.5
        else:
            bits = 4.75 if shape[1] % 128 else 4.625
        total += int(shape[0] * shape[1] * bits / 8)
    return total
