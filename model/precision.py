"""Which arithmetic a model runs in: what `--dtype`, `--quantization` and `--kv-cache-dtype` mean.

One static table, written out in docs/quantization.md: device and file format give the scheme,
and nothing is measured or guessed at start-up.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import LoadOptions, ModelConfig
from model.cpu.build import NativeUnavailable, find_library, machine_level
from model.cpu.network import Quantization, check_support
from model.errors import ConfigError
from model.weights.checkpoint import Checkpoint
from model.weights.tensors import required_tensors

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The numbers that a model is made of. `library` runs them; without it torch does."""

    quantization: Quantization
    dtype: str  # of what is not quantised
    kv_cache_dtype: str
    weights_bytes: int
    library: Path | None = None
    level: str = ""  # of the library's instructions

    @property
    def name(self) -> str:
        """The scheme in a few words, for logs, `/v1/models` and the fingerprint."""
        weights = self.dtype if self.quantization == "none" else self.quantization
        runs_on = f"native {self.level}" if self.library else "torch"
        return f"{weights}, {self.kv_cache_dtype} K/V, {runs_on}"


def choose_precision(
    options: LoadOptions, checkpoint: Checkpoint, device: torch.device
) -> Precision:
    """Read the table. Raises ConfigError for what does not go together."""
    config = checkpoint.config
    quantization = _pick_quantization(options, checkpoint, device)
    dtype = "float32" if quantization != "none" else _pick_dtype(options, config, device)
    if device.type == "cpu" and dtype == "float32":
        try:
            check_support(config, options.block_size)
            library = find_library(Path(options.cache_dir))
        except (ConfigError, NativeUnavailable) as error:
            if options.quantization in ("int8", "int4"):
                raise
            logger.warning("no native CPU step, float32 in torch instead: %s", error)
            quantization = "none"
        else:
            return _native(options, checkpoint, quantization, library)
    return Precision(
        quantization="none",
        dtype=dtype,
        kv_cache_dtype=_pick_kv_dtype(options, (dtype,)),
        weights_bytes=config.num_parameters * DTYPES[dtype].itemsize,
    )


def _native(
    options: LoadOptions, checkpoint: Checkpoint, quantization: Quantization, library: Path
) -> Precision:
    kv_dtypes = ("float16", "int8", "float32")
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
) -> Quantization:
    wanted = options.quantization
    if wanted in ("int8", "int4"):
        if device.type != "cpu":
            raise ConfigError(f"--quantization {wanted}: only --device cpu has it yet")
        if options.dtype != "auto":
            raise ConfigError(f"--quantization {wanted} and --dtype {options.dtype}: choose one")
        return wanted
    if wanted == "none" or device.type != "cpu" or options.dtype != "auto":
        return "none"
    types = [info.dtype for info in checkpoint.store.infos.values() if len(info.shape) == 2]
    is_in_4_bits = 2 * sum(each in _FOUR_BITS for each in types) > len(types)
    return "int4" if is_in_4_bits else "int8"


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
        is_file_in_8_bits = stored not in ("float32", "float16", "bfloat16", *_FOUR_BITS)
        if quantization == "none":
            bits = 32.0
        elif quantization == "int8":
            bits = 8.0 if "o_proj" not in name and "down_proj" not in name else 8.25
        elif stored in _FOUR_BITS or not (is_table or is_file_in_8_bits):
            bits = 5.0
        else:
            bits = 8.5
        total += int(shape[0] * shape[1] * bits / 8)
    return total
