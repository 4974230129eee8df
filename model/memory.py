"""How much memory there is, and how a model shares it out between weights, K/V and work space."""

from dataclasses import dataclass
from pathlib import Path

import torch

from model.attention.paged import KEY_BLOCK
from model.config import LoadOptions, ModelConfig
from model.errors import ConfigError, ResourceError
from model.kv_pool import kv_bytes_per_token
from model.layers.linear import ROW_TILE
from model.precision import DTYPES, KV_DTYPES, Precision

CPU_KV_CACHE_BYTES = 4 << 30  # unless --kv-cache-memory-bytes says otherwise
CPU_KV_CACHE_SHARE = 0.4  # of what is available once the weights are in


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


def plan_memory(
    options: LoadOptions, config: ModelConfig, precision: Precision, device: torch.device
) -> MemoryPlan:
    """Decide sizes before anything is allocated. Raises ConfigError or ResourceError."""
    max_num_seqs = options.max_num_seqs or (256 if device.type == "cuda" else 32)
    max_num_batched_tokens = options.max_num_batched_tokens or max(
        max_num_seqs, 2048 if device.type == "cuda" else 256
    )
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens} is less than --max-num-seqs "
            f"{max_num_seqs}: every sequence needs a token a step"
        )
    weights = precision.weights_bytes
    if precision.library:
        workspace = _native_workspace_bytes(config, max_num_batched_tokens, max_num_seqs)
    else:
        dtype = DTYPES[precision.dtype]
        workspace = _workspace_bytes(config, dtype, max_num_batched_tokens, max_num_seqs)
    wanted = _wanted_model_len(options, config)
    per_token = kv_bytes_per_token(config, KV_DTYPES[precision.kv_cache_dtype])
    per_block = per_token * options.block_size
    most = max_num_seqs * -(-wanted // options.block_size)
    budget = _kv_budget(options, device, weights + workspace)
    num_blocks = min(most, budget // per_block)
    max_model_len = _fitting_model_len(options, wanted, num_blocks * options.block_size, per_token)
    return MemoryPlan(
        device=str(device),
        weights_bytes=weights,
        kv_cache_bytes=num_blocks * per_block,
        workspace_bytes=workspace,
        block_size=options.block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=per_token,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def _wanted_model_len(options: LoadOptions, config: ModelConfig) -> int:
    if options.max_model_len is None:
        return config.max_position_embeddings
    is_fixed = config.rope.kind != "dynamic"
    if is_fixed and options.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {options.max_model_len} is more than the "
            f"{config.max_position_embeddings} positions that the model was made for"
        )
    return options.max_model_len


def _fitting_model_len(options: LoadOptions, wanted: int, capacity: int, per_token: int) -> int:
    """Return the context length: as wanted, or if nobody asked for it, what the pool holds."""
    if capacity >= wanted:
        return wanted
    if options.max_model_len is not None or capacity < options.block_size:
        raise ResourceError(
            f"a context of {wanted} tokens needs {wanted * per_token / 2**30:.2f} GiB of K/V, but "
            f"there is room for {capacity} tokens: lower --max-model-len or raise "
            "--kv-cache-memory-bytes"
        )
    return capacity


def _kv_budget(options: LoadOptions, device: torch.device, other_bytes: int) -> int:
    if options.kv_cache_memory_bytes is not None:
        return options.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserve = int(total * (1 - options.gpu_memory_utilization))
        budget = free - reserve - other_bytes
    else:
        left = available_host_bytes() - other_bytes
        budget = min(CPU_KV_CACHE_BYTES, int(left * CPU_KV_CACHE_SHARE))
    if budget <= 0:
        raise ResourceError(
            f"weights and work space need {other_bytes / 2**30:.1f} GiB, which leaves no room for "
            f"K/V on {device}; take a smaller model or precision, or lower --max-num-batched-tokens"
        )
    return budget


def _workspace_bytes(
    config: ModelConfig, dtype: torch.dtype, num_tokens: int, num_seqs: int
) -> int:
    """Bound the tensors alive at once in the largest step."""
    tokens = -(-num_tokens // ROW_TILE) * ROW_TILE
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    stream = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * q_size + 4 * kv_size
    # A query tile holds at most 16 rows, down to one token's; scores and weights are float32,
    # K and V of a key block are gathered once a tile.
    rows = max(ROW_TILE, config.num_heads // config.num_kv_heads)
    tile = config.num_kv_heads * (3 * rows + config.head_dim) * KEY_BLOCK * 4
    num_tiles = num_seqs + tokens * config.num_heads // (config.num_kv_heads * ROW_TILE)
    logits = (-(-num_seqs // ROW_TILE) * ROW_TILE) * config.vocab_size * 4 * 2
    return tokens * stream * dtype.itemsize + num_tiles * tile + logits


def _native_workspace_bytes(config: ModelConfig, num_tokens: int, num_seqs: int) -> int:
    """Sum what a native step allocates once, and the logits of the largest step."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    widest = max(config.hidden_size, q_size, config.intermediate_size)
    floats = 3 * config.hidden_size + 2 * q_size + 2 * kv_size + 2 * config.intermediate_size
    rows = num_tokens * (4 * floats + widest + widest // 32 * 8)
    return rows + num_seqs * config.vocab_size * 4 * 2


def available_host_bytes() -> int:
    """Return the memory that this process may still take, by the kernel and its cgroup."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines()
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text("ascii").strip()) != "max":
        available = min(available, int(text) - int(used.read_text("ascii")))
    return available
