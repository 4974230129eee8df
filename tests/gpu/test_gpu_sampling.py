"""The sampling kernels on a card, at a real vocabulary: needs torch, triton, numpy and pytest.

On a card `exp` is the same in torch and in the kernels, so ids are equal without exception.
"""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)
pytest.importorskip("triton")

from model.kernels.sample import sample_rows
from model.kernels.score import score
from model.sampling.edits import SampleRow
from model.sampling.logprobs import chosen_logprobs, score_in_torch
from model.sampling.sampler import sample
from model.sampling.table import Draw, SamplingTable
from model.step import SamplingParams

VOCAB_SIZE = 128256
DEVICE = torch.device("cuda")


def draw_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 2.0, 1e-9]),
        top_k=rng.choice([0, 0, 1, 20, 64, 1000, 20000, VOCAB_SIZE - 1, VOCAB_SIZE]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.999, 1e-6]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.001]),
        seed=rng.getrandbits(64),
        choice=rng.randrange(3),
    )


def draw_logits(num_rows: int, seed: int) -> torch.Tensor:
    """Rows of every sharpness; a third in bfloat16, which has many ties, some with masked ids."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=generator, device=DEVICE)
    logits *= torch.tensor([0.0, 1e-3, 0.5, 1.0, 2.0, 4.0], device=DEVICE).repeat(num_rows)[
        :num_rows, None
    ]
    logits[::3] = logits[::3].bfloat16().float()
    is_masked = torch.rand(VOCAB_SIZE, generator=generator, device=DEVICE) < 0.9
    logits[::5] = logits[::5].masked_fill(is_masked, -torch.inf)
    return logits


def reference(
    logits: torch.Tensor, params: list[SamplingParams], positions: list[int]
) -> torch.Tensor:
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    rows = [
        SampleRow(sampling=s, position=p, num_prompt_tokens=1, token_log=nothing)
        for s, p in zip(params, positions, strict=True)
    ]
    return sample(logits, rows).token_ids


@pytest.mark.parametrize("seed", range(8))
def test_ids_equal_those_of_torch(seed):
    rng = random.Random(seed)
    num_rows = 48
    params = [draw_params(rng) for _ in range(num_rows)]
    positions = [rng.randrange(1 << 20) for _ in range(num_rows)]
    logits = draw_logits(num_rows, seed)
    table = SamplingTable(num_rows, DEVICE)
    table.write(range(num_rows), params)
    rows = torch.arange(num_rows, device=DEVICE)
    at = torch.tensor(positions, device=DEVICE)
    ids, is_broken = sample_rows(logits, rows, at, table.words, Draw.FILTERED)
    expected = reference(logits, params, positions)
    wrong = (ids != expected).nonzero()[:, 0].tolist()
    told = [(row, params[row], int(ids[row]), int(expected[row])) for row in wrong]
    assert not wrong, told
    assert not is_broken.any()


def test_a_captured_graph_draws_what_the_table_and_positions_say_now():
    num_rows = 8
    logits = draw_logits(num_rows, 3)
    table = SamplingTable(num_rows, DEVICE)
    rows = torch.arange(num_rows, device=DEVICE)
    at = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    sample_rows(logits, rows, at, table.words, Draw.FILTERED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, _ = sample_rows(logits, rows, at, table.words, Draw.FILTERED)
    rng = random.Random(1)
    for position in range(5):
        params = [draw_params(rng) for _ in range(num_rows)]
        table.write(range(num_rows), params)
        at.fill_(position)
        logits.copy_(draw_logits(num_rows, position))
        graph.replay()
        assert torch.equal(ids, reference(logits, params, [position] * num_rows))


def test_nothing_waits_for_the_card():
    logits = draw_logits(4, 1)
    table = SamplingTable(4, DEVICE)
    rows = torch.arange(4, device=DEVICE)
    sample_rows(logits, rows, rows, table.words, Draw.FILTERED)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, _ = sample_rows(logits, rows, rows, table.words, Draw.FILTERED)
        table.write([1], [SamplingParams(seed=3)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ids, logits.argmax(-1))


def test_log_probabilities_equal_those_of_torch():
    logits = draw_logits(12, 5)
    token_ids = logits.argmax(-1)
    token_ids[::2] = torch.arange(6, device=DEVICE) * 20000
    got, expected = (chosen_logprobs(logits, token_ids, 20, way) for way in (score, score_in_torch))
    assert torch.equal(got.logprobs, expected.logprobs)
    assert torch.equal(got.ranks, expected.ranks)
    assert torch.equal(got.top_ids, expected.top_ids)
    assert torch.equal(got.top_logprobs, expected.top_logprobs)
