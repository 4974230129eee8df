"""Runs sequences through a network in any schedule: chunks, company and shared blocks at will."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.config import LoadOptions, ModelConfig
from model.fp8 import Fp8Rows
from model.kv_pool import KVPool
from model.llama import LlamaNetwork
from model.network import Network
from model.operations import TORCH, Operations
from model.rows import Rows
from model.step import NewRow, PlanRow, RunnerLimits, SamplingParams
from model.weights.checkpoint import open_checkpoint

BLOCK_SIZE = 16
MAX_MODEL_LEN = 320
CPU = torch.device("cpu")


def load_network(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 400,
    *,
    operations: Operations = TORCH,
    device: torch.device = CPU,
    kv_dtype: torch.dtype | None = None,
    is_fp8: bool = False,
) -> tuple[ModelConfig, LlamaNetwork]:
    """Build the network of a checkpoint with a small pool; with `is_fp8` in W8A8."""
    checkpoint = open_checkpoint(LoadOptions(model=str(folder)))
    config = checkpoint.config
    pool = KVPool(
        config,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        dtype=kv_dtype or dtype,
        device=device,
    )

    def read(name: str) -> Tensor:
        return checkpoint.read(name).to(device, dtype).contiguous()

    def read_fp8(name: str) -> Fp8Rows:
        return operations.fp8.quantize(read(name))

    with torch.inference_mode():
        network = LlamaNetwork(
            config,
            read,
            pool,
            min(MAX_MODEL_LEN, config.max_position_embeddings),
            operations,
            read_fp8 if is_fp8 else None,
        )
    return config, network


def make_limits(config: ModelConfig, num_seqs: int = 32, num_blocks: int = 400) -> RunnerLimits:
    return RunnerLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048,
        max_model_len=min(MAX_MODEL_LEN, config.max_position_embeddings),
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        vocab_size=config.vocab_size,
    )


@dataclass
class Walk:
    """A sequence on its way through the network, its logits collected position by position."""

    token_ids: list[int]
    row: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_sent: int = 0
    logits: list[Tensor] = field(default_factory=list)


class Schedule:
    """Steps over a network in which the test says who computes how many tokens."""

    def __init__(
        self,
        config: ModelConfig,
        network: Network,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self._network = network
        limits = make_limits(config)
        self._rows = Rows(limits, device)
        self._free_rows = list(range(limits.max_num_seqs))
        self._free_blocks = list(range(limits.num_blocks))
        random.Random(seed).shuffle(self._free_blocks)

    def add(self, token_ids: list[int], prefix_of: Walk | None = None, num_shared: int = 0) -> Walk:
        """Start a sequence; it may share the first blocks of another one."""
        walk = Walk(token_ids, self._free_rows.pop())
        if prefix_of is not None:
            assert num_shared % BLOCK_SIZE == 0
            walk.blocks = prefix_of.blocks[: num_shared // BLOCK_SIZE]
            walk.num_computed = num_shared
        new = NewRow(
            row=walk.row,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(),
        )
        self._rows.add(new)
        return walk

    @torch.inference_mode()
    def step(self, work: list[tuple[Walk, int]]) -> None:
        """Compute the next tokens of some sequences, all in one step."""
        plan_rows = []
        for walk, count in work:
            end = walk.num_computed + count
            while len(walk.blocks) * BLOCK_SIZE < end:
                walk.blocks.append(self._free_blocks.pop())
            plan_row = PlanRow(
                row=walk.row,
                start=walk.num_computed,
                num_tokens=count,
                new_block_ids=tuple(walk.blocks[walk.num_sent :]),
                logits_from=walk.num_computed,
                sample=False,
            )
            walk.num_sent = len(walk.blocks)
            self._rows.extend(plan_row)
            plan_rows.append(plan_row)
        inputs = self._rows.gather(tuple(plan_rows), self._network.row_tile).inputs
        logits = self._network.compute_logits(self._network.forward(inputs)).clone()
        for (walk, count), start in zip(work, inputs.query_starts[:-1], strict=True):
            walk.logits.extend(logits[start : start + count])
            walk.num_computed += count


@torch.inference_mode()
def logits_alone(
    config: ModelConfig, network: Network, token_ids: list[int], device: torch.device = CPU
) -> Tensor:
    """The logits [len, V] of a sequence computed alone, in one chunk."""
    schedule = Schedule(config, network, device=device)
    walk = schedule.add(token_ids)
    schedule.step([(walk, len(token_ids))])
    return torch.stack(walk.logits)
