"""Both attention kernels against plain attention in float64, one sequence and head at a time.

Lengths are tens of keys, so the tables' tiles and the splits are made smaller for the interpreter
where a test is about several of them. Tolerances: `examples.TOLERANCES`.
"""

import math
import random
from dataclasses import replace

import pytest
import torch

from model.kernels import paged_decode, paged_prefill
from model.kernels.paged_prefill import Tiling
from tests.model.kernels.examples import TOLERANCES, Problem, draw_problem

SMALL = Tiling(rows=16, keys=16, num_warps=4, num_stages=2)
FP8 = torch.float8_e4m3fn


def prefill(problem: Problem, tiling: Tiling | None = None, num_short: int = 0) -> torch.Tensor:
    queries = problem.queries
    group = queries.shape[1] // problem.keys.shape[0]
    output = torch.full_like(queries, math.nan)
    paged_prefill.paged_prefill(
        queries,
        output,
        (problem.keys, problem.values),
        problem.step,
        tiling=tiling
        or paged_prefill.choose_tiling(queries.shape[2], group, queries.dtype.itemsize),
        scale=problem.scale,
        value_scale=problem.value_scale,
        num_short=num_short,
    )
    return output


def decode(problem: Problem, tiling: Tiling | None = None, num_short: int = 1) -> torch.Tensor:
    queries = problem.queries
    group = queries.shape[1] // problem.keys.shape[0]
    output = torch.full_like(queries, math.nan)
    work = paged_decode.plan_decode(problem.step, num_short, *queries.shape[1:])
    paged_decode.paged_decode(
        queries,
        output,
        (problem.keys, problem.values),
        problem.step,
        work,
        tiling=tiling
        or paged_decode.choose_tiling(queries.shape[2], group, queries.dtype.itemsize),
        scale=problem.scale,
        value_scale=problem.value_scale,
    )
    return output


def assert_equals_reference(problem: Problem, output: torch.Tensor) -> None:
    tolerance = TOLERANCES[problem.queries.dtype]
    expected = problem.reference()
    torch.testing.assert_close(
        output.cpu().to(torch.float64), expected, rtol=tolerance, atol=tolerance
    )


def draw_shape(rng: random.Random) -> dict[str, int]:
    return {
        "num_kv_heads": rng.choice([1, 2]),
        "group": rng.choice([1, 2, 3, 4, 8]),
        "head_dim": rng.choice([16, 64, 80, 96, 128]),
        "block_size": rng.choice([16, 32, 64, 128]),
    }


def draw_lengths(rng: random.Random, most_new: int) -> list[tuple[int, int]]:
    counts = [rng.randint(1, most_new) for _ in range(rng.randint(1, 4))]
    return [(count, count + rng.choice([0, 1, 15, 16, 40])) for count in counts]


@pytest.fixture
def small_splits(monkeypatch):
    """Splits of 16 keys and more, 4 a sequence at most."""
    monkeypatch.setattr(paged_decode, "MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr(paged_decode, "MAX_SPLITS", 4)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_prefill_equals_the_reference(dtype, device):
    rng = random.Random(3)
    for _ in range(4):
        lengths = draw_lengths(rng, 14)
        problem = draw_problem(rng, device, lengths=lengths, dtype=dtype, **draw_shape(rng))
        assert_equals_reference(problem, prefill(problem, SMALL))


def test_prefill_in_the_tables_tiles_equals_the_reference(device):
    rng = random.Random(4)
    for head_dim, dtype in [(64, torch.float16), (128, torch.float16), (160, torch.float16)]:
        shape = {"num_kv_heads": 1, "group": 4, "head_dim": head_dim, "block_size": 16}
        lengths = [(70, 70), (1, 130), (0, 0), (33, 100)]
        problem = draw_problem(rng, device, lengths=lengths, dtype=dtype, **shape)
        assert_equals_reference(problem, prefill(problem))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_decode_equals_the_reference(dtype, device, small_splits):
    rng = random.Random(5)
    for _ in range(6):
        lengths = [(1, rng.randint(1, 100)) for _ in range(rng.randint(1, 4))]
        shape, table_dtype = draw_shape(rng), rng.choice([torch.int32, torch.int64])
        problem = draw_problem(
            rng, device, lengths=lengths, dtype=dtype, table_dtype=table_dtype, **shape
        )
        assert_equals_reference(problem, decode(problem, SMALL))


def test_decode_in_the_tables_tiles_equals_the_reference(device):
    rng = random.Random(6)
    for head_dim, group in [(64, 3), (128, 8), (256, 1)]:
        shape = {"num_kv_heads": 2, "group": group, "head_dim": head_dim, "block_size": 16}
        lengths = [(1, 300), (1, 256), (1, 1), (1, 600)]
        problem = draw_problem(rng, device, lengths=lengths, dtype=torch.float16, **shape)
        assert_equals_reference(problem, decode(problem))


@pytest.mark.parametrize("kernel", [prefill, decode])
@pytest.mark.parametrize("is_coded", [False, True], ids=["native", "integer-codec"])
def test_fp8_keys_and_values_are_read_with_their_scales(kernel, is_coded, device, small_splits):
    rng = random.Random(7)
    for _ in range(4):
        lengths = [(1, rng.randint(1, 60)) for _ in range(3)]
        problem = draw_problem(
            rng, device, lengths=lengths, dtype=torch.float16, kv_dtype=FP8, **draw_shape(rng)
        )
        expected = problem.reference()
        if is_coded:
            view = [each.view(torch.uint8) for each in (problem.keys, problem.values)]
        else:
            view = [problem.keys, problem.values]
        got = _with_pool(kernel, problem, view)
        torch.testing.assert_close(got.cpu().to(torch.float64), expected, rtol=4e-3, atol=4e-3)


def _with_pool(kernel, problem, pool):
    return kernel(replace(problem, keys=pool[0], values=pool[1]), SMALL)


def test_few_new_tokens_are_served_by_decode_and_many_by_prefill(device, small_splits):
    rng = random.Random(8)
    shape = {"num_kv_heads": 2, "group": 4, "head_dim": 32, "block_size": 16}
    for _ in range(2):
        lengths = [*draw_lengths(rng, 9), (0, 0), (3, 70), (5, 40)]
        rng.shuffle(lengths)
        problem = draw_problem(rng, device, lengths=lengths, **shape)
        short, long = decode(problem, SMALL, num_short=4), prefill(problem, SMALL, num_short=4)
        is_long = torch.tensor([count > 4 for count in problem.counts for _ in range(count)])
        assert torch.equal(short.isnan().any((1, 2)).cpu(), is_long)
        assert torch.equal(long.isnan().any((1, 2)).cpu(), ~is_long)
        assert_equals_reference(problem, torch.where(short.isnan(), long, short))


@pytest.mark.parametrize("kernel", [prefill, decode])
def test_a_sequence_has_the_same_bits_whoever_is_beside_it(kernel, device, small_splits):
    rng = random.Random(9)
    shape = {"num_kv_heads": 1, "group": 4, "head_dim": 32, "block_size": 16}
    for _ in range(2):
        lengths = [(count, 60) for count in (1, 3, 2, 4)] if kernel is decode else None
        lengths = lengths or draw_lengths(rng, 30)
        problem = draw_problem(rng, device, lengths=lengths, **shape)
        together = _run(kernel, problem)
        starts = problem.step.query_starts.tolist()
        for row, count in enumerate(problem.counts):
            own = slice(starts[row], starts[row] + count)
            alone = _alone(problem, row, own)
            assert torch.equal(_run(kernel, alone), together[own])


def _run(kernel, problem):
    return kernel(problem, SMALL, num_short=4) if kernel is decode else kernel(problem, SMALL)


def _alone(problem, row, own):
    step = problem.step
    starts = torch.tensor([0, own.stop - own.start], dtype=torch.int32, device=step.seq_lens.device)
    return replace(
        problem,
        queries=problem.queries[own],
        step=replace(
            step,
            block_tables=step.block_tables[row : row + 1],
            query_starts=starts,
            seq_lens=step.seq_lens[row : row + 1],
        ),
    )


def test_chunks_of_a_prompt_have_the_bits_of_the_whole(device):
    rng = random.Random(10)
    shape = {"num_kv_heads": 1, "group": 4, "head_dim": 32, "block_size": 16}
    problem = draw_problem(rng, device, lengths=[(60, 60)], **shape)
    whole = prefill(problem, SMALL)
    # Cut where tiles begin: the interpreter's BLAS does not treat all rows of a tile alike.
    for start, end in [(0, 8), (8, 24), (24, 60), (56, 60)]:
        chunk = _alone(problem, 0, slice(start, end))
        seq_lens = torch.tensor([end], dtype=torch.int32, device=device)
        chunk = replace(chunk, step=replace(chunk.step, seq_lens=seq_lens))
        assert torch.equal(prefill(chunk, SMALL), whole[start:end])


def test_splits_of_a_sequence_depend_on_its_length_alone(device):
    lengths = [1, 256, 257, 8192, 8193, 131072]
    device_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    tables = torch.zeros(len(lengths), 1, dtype=torch.int32, device=device)
    step = paged_prefill.PagedStep(
        block_tables=tables, query_starts=starts, seq_lens=device_lengths, block_size=16
    )
    work = paged_decode.plan_decode(step, 1, 1, 16)
    assert work.split_starts.diff().tolist() == [1, 1, 2, 32, 17, 32]


def test_padding_of_a_static_batch_does_nothing(device, small_splits):
    rng = random.Random(12)
    shape = {"num_kv_heads": 2, "group": 2, "head_dim": 32, "block_size": 16}
    problem = draw_problem(rng, device, lengths=[(1, 50), (1, 0), (1, 20), (1, 0)], **shape)
    output = decode(problem, SMALL)
    assert output.isnan().all((1, 2)).tolist() == [False, True, False, True]
    is_real = ~output.isnan()
    torch.testing.assert_close(
        output[is_real], problem.reference()[is_real.cpu()].to(output), rtol=2e-5, atol=2e-5
    )
