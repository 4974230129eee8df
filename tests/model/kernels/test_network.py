"""The network over Triton's operations against the same network over torch's."""

import random

import pytest
import torch

from model.config import LoadOptions
from model.kernels.launch import is_interpreted
from model.kv_pool import KVPool
from model.layers.fp8 import CAPABILITY
from model.llama import LlamaNetwork
from model.network import StepInputs
from model.operations import TORCH, Operations, invariant_operations, triton_operations
from model.rows import Rows
from model.step import NewRow, PlanRow, RunnerLimits, SamplingParams
from model.weights.checkpoint import open_checkpoint
from tests.toy import VARIANTS, write_toy_checkpoint

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 24, 64
MIN_GAP = 1e-3
FP8 = torch.float8_e4m3fn


class Conversation:
    """Sequences that join at different steps and continue greedily, in whatever batch is there."""

    def __init__(
        self,
        folder,
        operations: Operations,
        device: torch.device,
        kv_dtype: torch.dtype = torch.float32,
        is_fp8: bool = False,
    ) -> None:
        checkpoint = open_checkpoint(LoadOptions(model=str(folder)))
        self.config = checkpoint.config
        self.pool = KVPool(
            self.config,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            dtype=kv_dtype,
            device=device,
        )
        for scales in (self.pool.key_scales, self.pool.value_scales):
            scales[:] = [0.05 if kv_dtype is FP8 else 1.0] * self.config.num_layers

        def read(name):
            return checkpoint.read(name).to(device).contiguous()

        self.network = LlamaNetwork(
            self.config,
            read,
            self.pool,
            MAX_MODEL_LEN,
            operations,
            (lambda name: operations.fp8.quantize(read(name))) if is_fp8 else None,
        )
        limits = RunnerLimits(
            max_num_seqs=4,
            max_num_batched_tokens=256,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            vocab_size=self.config.vocab_size,
        )
        self.rows = Rows(limits, device)
        self.blocks = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(self.blocks)
        self.token_ids: list[list[int]] = []
        self.num_computed: list[int] = []
        self.smallest_gap = 1e9

    def add(self, prompt: list[int]) -> None:
        row = len(self.token_ids)
        self.token_ids.append(list(prompt))
        self.num_computed.append(0)
        new = NewRow(
            row=row,
            token_ids=tuple(prompt),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(),
        )
        self.rows.add(new)

    @torch.inference_mode()
    def step(self, most: int) -> StepInputs:
        """Compute up to `most` tokens of every sequence; append where its end was reached."""
        plan_rows = []
        for row, token_ids in enumerate(self.token_ids):
            start = self.num_computed[row]
            end = min(len(token_ids), start + most)
            new = range(-(-start // BLOCK_SIZE), -(-end // BLOCK_SIZE))
            plan_row = PlanRow(
                row=row,
                start=start,
                num_tokens=end - start,
                new_block_ids=tuple(self.blocks.pop() for _ in new),
                logits_from=start,
                sample=False,
            )
            self.rows.extend(plan_row)
            plan_rows.append(plan_row)
            self.num_computed[row] = end
        inputs = self.rows.gather(tuple(plan_rows), self.network.row_tile).inputs
        logits = self.network.compute_logits(self.network.forward(inputs))
        for row, token_ids in enumerate(self.token_ids):
            if self.num_computed[row] == len(token_ids):
                last = logits[inputs.query_starts[row + 1] - 1]
                best = last.topk(2).values
                self.smallest_gap = min(self.smallest_gap, float(best[0] - best[1]))
                token_ids.append(int(last.argmax()))
                self.rows.token_log[row, len(token_ids) - 1] = token_ids[-1]
        return inputs


def converse(
    folder, operations, device, num_steps=3, kv_dtype=torch.float32, is_fp8=False
) -> Conversation:
    rng = random.Random(1)
    conversation = Conversation(folder, operations, device, kv_dtype, is_fp8)
    for length in (21, 3):
        conversation.add([rng.randrange(conversation.config.vocab_size) for _ in range(length)])
    conversation.step(most=9)  # a chunk of one, all of the other
    conversation.add([rng.randrange(conversation.config.vocab_size) for _ in range(11)])
    for _ in range(num_steps):
        conversation.step(most=9)
    return conversation


@pytest.mark.parametrize(
    ("variant", "kv_dtype"), [("gqa", torch.float32), ("all-biases-tied", FP8)], ids=str
)
def test_greedy_tokens_equal_those_of_torch(variant, kv_dtype, tmp_path, device):
    folder = write_toy_checkpoint(tmp_path, **VARIANTS[variant])
    expected = converse(folder, TORCH, device, kv_dtype=kv_dtype)
    got = converse(folder, triton_operations(), device, kv_dtype=kv_dtype)
    assert expected.smallest_gap > MIN_GAP, "the reference has a near-tie: choose another seed"
    assert got.token_ids == expected.token_ids
    # A value between two codes of fp8 may go to either: one part in eight.
    tolerance = {"rtol": 0.13, "atol": 1e-3} if kv_dtype is FP8 else {"rtol": 1e-4, "atol": 1e-4}
    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE, device=device)
    for layer in range(expected.config.num_layers):
        for mine, theirs in zip(
            got.pool.read(layer, slots, torch.float32),
            expected.pool.read(layer, slots, torch.float32),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("operations", [triton_operations, invariant_operations])
def test_greedy_tokens_in_fp8_equal_those_of_torch(operations, tmp_path, device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        pytest.skip("the card has no fp8 products")
    folder = write_toy_checkpoint(tmp_path, seed=1, **VARIANTS["attention-bias"])
    expected = converse(folder, TORCH, device, num_steps=2, kv_dtype=FP8, is_fp8=True)
    got = converse(folder, operations(), device, num_steps=2, kv_dtype=FP8, is_fp8=True)
    # Activations that differ in their last bit may become neighbouring codes.
    assert expected.smallest_gap > 0.3, "the reference has a near-tie: choose another seed"
    assert got.token_ids == expected.token_ids


def test_a_step_over_static_device_tensors_equals_one_from_host_lists(tmp_path, device):
    """What a CUDA graph replays: host lists say only that every sequence has one token."""
    folder = write_toy_checkpoint(tmp_path)
    conversation = converse(folder, triton_operations(), device, num_steps=2)
    network, pool = conversation.network, conversation.pool
    before = [each.clone() for each in (*pool.keys, *pool.values)]
    inputs = conversation.step(most=9)
    assert inputs.query_starts == [0, 1, 2, 3]
    padded, num_blocks = 16, MAX_MODEL_LEN // BLOCK_SIZE
    block_tables = torch.full((padded, num_blocks), -(10**6), dtype=torch.int32, device=device)
    block_tables[:3, : inputs.block_tables.shape[1]] = inputs.block_tables
    seq_lens = torch.zeros(padded, dtype=torch.int32, device=device)
    seq_lens[:3] = torch.tensor(inputs.seq_lens, dtype=torch.int32)
    token_ids, positions = (torch.zeros(padded, dtype=torch.int64, device=device) for _ in range(2))
    slots = torch.full((padded,), -1, dtype=torch.int64, device=device)
    for static, values in ((token_ids, inputs.token_ids), (positions, inputs.positions)):
        static[:3] = values[:3]
    slots[:3] = inputs.slots[:3]
    static_inputs = StepInputs(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        block_tables=block_tables,
        query_starts=list(range(padded + 1)),
        seq_lens=[1] * padded,
        device_query_starts=torch.arange(padded + 1, dtype=torch.int32, device=device),
        device_seq_lens=seq_lens,
    )
    expected = [each.clone() for each in (*pool.keys, *pool.values)]
    for each, old in zip((*pool.keys, *pool.values), before, strict=True):
        each.copy_(old)
    with torch.inference_mode():
        hidden = network.forward(inputs)[:3]
        static_hidden = network.forward(static_inputs)[:3]
    torch.testing.assert_close(static_hidden, hidden)
    for each, written in zip((*pool.keys, *pool.values), expected, strict=True):
        torch.testing.assert_close(each, written)


def test_warming_up_writes_nothing(tmp_path, device):
    conversation = Conversation(write_toy_checkpoint(tmp_path), triton_operations(), device)
    with torch.inference_mode():
        conversation.network.warm_up()
    pool = conversation.pool
    assert not any(each.any() for each in (*pool.keys, *pool.values))


def test_kernels_are_interpreted_without_a_card(device):
    assert is_interpreted() == (device.type == "cpu")
