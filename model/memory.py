"""How much memory there is, and how a model shares it out between weights, K/V and work space."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.attention.paged import KEY_BLOCK
from model.config import LoadOptions, ModelConfig
from model.cpu.threads import available_threads
from model.errors import ConfigError, ResourceError
from model.graphs import decode_sizes
from model.kv_pool import kv_bytes_per_token
from model.layers.linear import ROW_TILE
from model.precision import DTYPES, KV_DTYPES, Precision

CPU_KV_CACHE_BYTES = 4 << 30  # unless --kv-cache-memory-bytes says otherwise
CPU_KV_CACHE_SHARE = 0.4  # of what is available once the weights are in
GRAPH_BYTES = 8 << 20  # of a CUDA graph, in the driver; not measured
LIBRARY_BYTES = 128 << 20  # what cuBLAS and the allocator's rounding take; not measured
SMALL_MODEL = 500_000_000  # parameters; on a CPU
NATIVE_ROWS = 96  # of work space a thread, at most: step.c
DRAW_BYTES = 96 << 10  # of a sequence: partial sums and the short list of model/kernels/sample.py
# Of model/kernels/paged_decode.py, which cannot be imported without Triton.
MAX_SPLITS = 32  # of a sequence's keys
SHORT_ROWS = 16  # rows of query heads that keys are split for


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the bytes go; printed at start-up and by `arriero info`."""

    device: str
    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int  # activations of the largest step; on a GPU the rows as well
    logits_bytes: int
    graphs_bytes: int  # CUDA graphs, and the memory that they share
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def planned_bytes(self) -> int:
        """All of it."""
        work = self.workspace_bytes + self.logits_bytes + self.graphs_bytes
        return self.weights_bytes + self.kv_cache_bytes + work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a step needs besides weights and K/V."""

    workspace_bytes: int
    logits_bytes: int
    graphs_bytes: int = 0


def plan_memory(
    options: LoadOptions,
    config: ModelConfig,
    precision: Precision,
    device: torch.device,
    *,
    runs_kernels: bool = False,
) -> MemoryPlan:
    """Decide sizes before anything is allocated. Raises ConfigError or ResourceError.

    `runs_kernels` says that Triton computes what lies between the products.
    """
    max_num_seqs = options.max_num_seqs or (256 if device.type == "cuda" else 32)
    max_num_batched_tokens = options.max_num_batched_tokens or max(
        max_num_seqs, _tokens_in_a_step(config, device, is_native=bool(precision.library))
    )
    if max_num_batched_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens} is less than --max-num-seqs "
            f"{max_num_seqs}: every sequence needs a token a step"
        )
    weights = precision.weights_bytes
    wanted = _wanted_model_len(options, config)
    dtype = DTYPES[precision.dtype]
    if precision.library:
        work = _native_work(config, max_num_batched_tokens, max_num_seqs)
    elif runs_kernels:
        has_graphs = not options.enforce_eager
        work = _kernel_work(config, dtype, max_num_batched_tokens, max_num_seqs, has_graphs)
        rows = (max_num_seqs + 1) * (wanted + 1 + -(-wanted // options.block_size)) * 4
        work = replace(work, workspace_bytes=work.workspace_bytes + rows)
    else:
        work = _torch_work(config, dtype, max_num_batched_tokens, max_num_seqs)
    per_token = kv_bytes_per_token(config, KV_DTYPES[precision.kv_cache_dtype])
    per_block = per_token * options.block_size
    most = max_num_seqs * -(-wanted // options.block_size)
    other = weights + work.workspace_bytes + work.logits_bytes + work.graphs_bytes
    budget = _kv_budget(options, device, other)
    num_blocks = min(most, budget // per_block)
    max_model_len = _fitting_model_len(options, wanted, num_blocks * options.block_size, per_token)
    return MemoryPlan(
        device=str(device),
        weights_bytes=weights,
        kv_cache_bytes=num_blocks * per_block,
        workspace_bytes=work.workspace_bytes,
        logits_bytes=work.logits_bytes,
        graphs_bytes=work.graphs_bytes,
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


def _torch_work(config: ModelConfig, dtype: torch.dtype, num_tokens: int, num_seqs: int) -> _Work:
    """Bound the tensors alive at once in the largest step in torch."""
    tokens = -(-num_tokens // ROW_TILE) * ROW_TILE
    stream = _stream_size(config)
    # A query tile holds at most 16 rows, down to one token's; scores and weights are float32,
    # K and V of a key block are gathered once a tile.
    rows = max(ROW_TILE, config.num_heads // config.num_kv_heads)
    tile = config.num_kv_heads * (3 * rows + config.head_dim) * KEY_BLOCK * 4
    num_tiles = num_seqs + tokens * config.num_heads // (config.num_kv_heads * ROW_TILE)
    logits = (-(-num_seqs // ROW_TILE) * ROW_TILE) * config.vocab_size * 4 * 2
    workspace = tokens * stream * dtype.itemsize + num_tiles * tile
    return _Work(workspace_bytes=workspace, logits_bytes=logits)


def _kernel_work(
    config: ModelConfig, dtype: torch.dtype, num_tokens: int, num_seqs: int, has_graphs: bool
) -> _Work:
    """Bound the same for Triton, and for the graphs of decode steps.

    A graph of n sequences allocates what a step of n tokens does, and so does the run before it
    is captured, on a stream whose memory is its own.
    """
    token = _stream_size(config) * dtype.itemsize
    partial = config.num_heads * MAX_SPLITS * (config.head_dim + 2) * 4
    num_short = max(1, SHORT_ROWS * config.num_kv_heads // config.num_heads)
    # Decode has float32 logits of its own. Another step may have that many again, with the
    # head's output and a copy of the rows that are edited.
    logits = num_seqs * config.vocab_size * (4 + dtype.itemsize + 4 + 4)
    graphs = 0
    if has_graphs:
        decode = token + partial + config.vocab_size * dtype.itemsize + DRAW_BYTES
        num_graphs = 2 * len(decode_sizes(num_seqs, 1))
        graphs = 2 * num_seqs * decode + num_graphs * GRAPH_BYTES
    partials = num_seqs * (num_short * partial + DRAW_BYTES)
    workspace = num_tokens * token + partials + LIBRARY_BYTES
    return _Work(workspace_bytes=workspace, logits_bytes=logits, graphs_bytes=graphs)


def _stream_size(config: ModelConfig) -> int:
    """Bound the numbers that a token has at once on its way through a layer."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return 4 * config.hidden_size + 3 * config.intermediate_size + 3 * q_size + 4 * kv_size


def _tokens_in_a_step(config: ModelConfig, device: torch.device, *, is_native: bool) -> int:
    """Return as many tokens as a step computes well, and others may wait for.

    On two cores 512 tokens take the native step 0.08 s of a model of 110 million parameters, and
    0.7 of one of 1.1 billion.
    """
    if device.type == "cuda":
        return 2048
    return 512 if is_native and config.num_parameters < SMALL_MODEL else 256


def _native_work(config: ModelConfig, num_tokens: int, num_seqs: int) -> _Work:
    """Sum what a native step allocates once, and the logits of the largest step."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    of_token = 4 * (2 * hidden + q_size + 2 * kv_size)  # stream, what comes out, queries to values
    widest = max(hidden, q_size, inner)
    of_row = 4 * (max(hidden, q_size) + max(2 * inner, hidden)) + widest + widest // 32 * 8
    num_rows = NATIVE_ROWS * available_threads()
    workspace = num_tokens * of_token + num_rows * of_row
    return _Work(workspace_bytes=workspace, logits_bytes=num_seqs * config.vocab_size * 4 * 2)


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
