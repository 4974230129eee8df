"""Decode steps that take nothing from the host, against steps gathered anew each time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton

from model import memory
from model.config import LoadOptions
from model.decode import look_up
from model.graphs import GraphRecorder, Replay
from model.kernels import paged_decode, places, sampling
from model.kv_pool import KVPool
from model.llama import LlamaNetwork
from model.operations import triton_operations, triton_runner_kernels
from model.runner import ModelRunner
from model.step import RunnerLimits, SamplingParams
from model.weights.checkpoint import open_checkpoint
from tests.model.test_runner import request, serve, tokens
from tests.toy import write_toy_checkpoint


class Repeater:
    """Stands for CUDA graphs: what was captured is run again."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, run: Callable[[], None]) -> Replay:
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_toy_checkpoint(tmp_path_factory.mktemp("toy"), max_position_embeddings=64)
    return open_checkpoint(LoadOptions(model=str(folder)))


def make_runner(
    checkpoint, device, *, on_device: bool, recorder: GraphRecorder | None = None
) -> ModelRunner:
    limits = RunnerLimits(
        max_num_seqs=3,
        max_num_batched_tokens=16,
        max_model_len=64,
        block_size=16,
        num_blocks=16,
        vocab_size=checkpoint.config.vocab_size,
    )
    pool = KVPool(
        checkpoint.config,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        dtype=torch.float32,
        device=device,
    )
    with torch.inference_mode():
        network = LlamaNetwork(
            checkpoint.config,
            lambda name: checkpoint.read(name).to(device).contiguous(),
            pool,
            limits.max_model_len,
            triton_operations(),
        )
    return ModelRunner(network, limits, device, decodes_on_device=on_device, recorder=recorder)


@pytest.fixture
def runner_kernels(device, monkeypatch):
    """Have runners made on a CPU look up and draw as they would on a card."""
    kernels = triton_runner_kernels()
    monkeypatch.setattr("model.runner.choose_runner_kernels", lambda _device: kernels)


def requests_that_join_and_leave():
    """Prompts that cross a block's border while they decode; rows are taken over by others."""
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=7),
        SamplingParams(temperature=0.9, seed=1, max_tokens=3),
        SamplingParams(temperature=0.9, seed=2, repetition_penalty=1.3, max_tokens=5),
        SamplingParams(temperature=0.0, max_tokens=4),
    ]
    return [
        request(str(number), [3 + (5 * number + place) % 40 for place in range(length)], sampling)
        for number, (length, sampling) in enumerate(zip((14, 3, 16, 9), samplings, strict=True))
    ]


def generated(runner: ModelRunner) -> dict[tuple[str, int], list[int]]:
    outputs, _ = serve(runner, requests_that_join_and_leave(), late=2)
    return {key: tokens(each) for key, each in outputs.items()}


@pytest.fixture(scope="module")
def expected(checkpoint, device):
    with np.errstate(all="ignore"):  # as for tests: conftest.py
        return generated(make_runner(checkpoint, device, on_device=False))


def test_looking_up_is_what_the_reference_does(device):
    generator = torch.Generator().manual_seed(4)
    token_log = torch.randint(0, 1000, (5, 65), generator=generator, dtype=torch.int32)
    tables = torch.randint(0, 99, (5, 4), generator=generator, dtype=torch.int32)
    rows = torch.tensor([3, 0, 4, 1, 4])
    positions = torch.tensor([0, 63, -1, 16, -1])
    on_device = [each.to(device) for each in (rows, positions.clone(), token_log, tables)]
    got = places.look_up(*on_device, 16)
    expected = look_up(rows, positions, token_log, tables, 16)
    for ours, theirs in zip((*got, on_device[1]), (*expected, positions), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


def test_memory_plan_knows_the_kernels_sizes():
    assert memory.MAX_SPLITS == paged_decode.MAX_SPLITS
    widest = [paged_decode.choose_tiling(128, group, 2).rows for group in (1, 4, 8, 16)]
    assert max(widest) == memory.SHORT_ROWS
    num_splits = triton.next_power_of_2(triton.cdiv(128256, sampling.CHUNK.value))
    words = num_splits * (3 + 2 * sampling.LEVELS.value) + sampling.STATE_COLUMNS.value
    assert words * 8 + sampling.LIST_LEN.value * 4 <= memory.DRAW_BYTES


def test_tokens_are_those_of_steps_gathered_anew(checkpoint, device, expected):
    assert sum(map(len, expected.values())) == 19
    runner = make_runner(checkpoint, device, on_device=True)
    runner.warm_up()  # as at start-up: with nobody in it
    assert generated(runner) == expected


@pytest.mark.usefixtures("runner_kernels")
def test_tokens_are_the_same_when_they_are_drawn_on_the_device(checkpoint, device, expected):
    runner = make_runner(checkpoint, device, on_device=True)
    runner.warm_up()
    assert generated(runner) == expected


@pytest.mark.usefixtures("runner_kernels")
def test_tokens_stay_the_same_when_graphs_take_over(checkpoint, device, expected, monkeypatch):
    monkeypatch.setattr("model.graphs.CAPTURE_SHARE", 1.0)  # one after every step
    recorder = Repeater()
    runner = make_runner(checkpoint, device, on_device=True, recorder=recorder)
    assert generated(runner) == expected
    assert recorder.num_replays > 2
