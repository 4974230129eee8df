"""Ids of the sampling kernels against those of model/sampling, which are equal to the bit.

The interpreter's `exp` is numpy's and may differ from torch's by a unit in the last place; with
fixed seeds no number falls on such a boundary.
"""

import math
import random
from dataclasses import replace

import pytest
import torch

from model.kernels.sample import sample_rows
from model.kernels.score import score
from model.sampling.edits import SampleRow, forbid_by_masks
from model.sampling.logprobs import chosen_logprobs
from model.sampling.residents import ResidentDraws
from model.sampling.sampler import choose_by, sample
from model.sampling.table import Draw, SamplingTable, lines
from model.step import NewRow, PlanRow, SamplingParams


def draw_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5, 1e-9]),
        top_k=rng.choice([0, 0, 1, 5, 50, vocab_size - 1, vocab_size, 10**6]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5, 0.99, 1e-6]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.9]),
        seed=rng.getrandbits(64),
        choice=rng.randrange(5),
    )


def draw_logits(rng: random.Random, num_rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * rng.choice([0.1, 2, 8])
    for row in range(num_rows):
        if rng.random() < 0.4:  # many ties
            logits[row] = (logits[row] * 2).round() / 2
        if rng.random() < 0.2:  # masked ids
            logits[row, torch.rand(vocab_size, generator=generator) < 0.7] = -math.inf
            logits[row, rng.randrange(vocab_size)] = 1.0
    return logits


def reference(logits, params, positions):
    rows = [
        SampleRow(sampling=s, position=p, num_prompt_tokens=1, token_log=torch.empty(0))
        for s, p in zip(params, positions, strict=True)
    ]
    sampled = sample(logits.cpu(), rows)
    return sampled.token_ids.tolist(), sampled.is_broken.tolist()


def kernels(logits, params, positions, most=Draw.FILTERED):
    rows = torch.arange(len(params), device=logits.device)
    at = torch.tensor(positions, device=logits.device)
    ids, is_broken = sample_rows(
        logits, rows, at, torch.from_numpy(lines(params)).to(logits.device), most
    )
    return ids.tolist(), is_broken.tolist()


@pytest.mark.parametrize("vocab_size", [50, 3000, 9001])
def test_ids_equal_those_of_the_reference(vocab_size, device):
    rng = random.Random(vocab_size)
    for _ in range(3):
        params = [draw_params(rng, vocab_size) for _ in range(6)]
        positions = [rng.choice([0, 7, 2**31 + 5, 2**33 + 1]) for _ in params]
        logits = draw_logits(rng, len(params), vocab_size).to(device)
        assert kernels(logits, params, positions) == reference(logits, params, positions)


def test_cuts_that_lie_deep(device):
    """All logits alike, or nearly so: bisection goes over the row. Or a list from the cut on."""
    rng = random.Random(5)
    logits = torch.randn(6, 20000, generator=torch.Generator().manual_seed(3))
    logits[:2] = 0.0
    logits[2:4] *= 1e-3
    filters = [(0, 0.7), (15000, 0.5), (0, 0.9), (12345, 1.0), (0, 0.95), (12345, 1.0)]
    params = [SamplingParams(top_k=k, top_p=p, seed=rng.getrandbits(64)) for k, p in filters]
    positions = list(range(len(params)))
    logits = logits.to(device)
    assert kernels(logits, params, positions) == reference(logits, params, positions)


def test_rows_that_ask_for_less_need_fewer_kernels(device):
    rng = random.Random(2)
    logits = draw_logits(rng, 3, 500).to(device)
    greedy = [SamplingParams(temperature=0.0)] * 3
    plain = [SamplingParams(seed=5), SamplingParams(min_p=0.3, seed=6), greedy[0]]
    for params, most in ((greedy, Draw.GREEDY), (plain, Draw.PLAIN)):
        assert kernels(logits, params, [4, 5, 6], most) == reference(logits, params, [4, 5, 6])


def test_rows_without_a_choice_are_broken(device):
    logits = torch.zeros(5, 100)
    logits[0, 30] = math.nan
    logits[1, 30] = math.inf
    logits[2] = -math.inf
    logits[3, 99] = -math.nan
    logits[4, :50] = -math.inf
    logits = logits.to(device)
    for s in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, top_k=7, seed=1)):
        ids, is_broken = kernels(logits, [s] * 5, [9] * 5)
        assert is_broken == [True, True, True, True, False]
        assert ids[:4] == [0, 0, 0, 0]
        assert ids[4] >= 50


def test_lines_of_a_table_stay_until_they_are_written_again(device):
    table = SamplingTable(4, device)
    hot, cold = SamplingParams(top_p=0.8, seed=3), SamplingParams(top_k=3, seed=2**64 - 1)
    table.write([2, 0], [hot, cold])
    table.write([2], [cold])
    table.write([], [])
    rows, positions = (torch.tensor(x, device=device) for x in ([0, 2, 4, 1], [3, 3, -1, 0]))
    logits = draw_logits(random.Random(4), 1, 300).expand(4, 300).contiguous().to(device)
    ids, _ = sample_rows(logits, rows, positions, table.words, Draw.FILTERED)
    greedy = SamplingParams(temperature=0.0)
    expected, _ = reference(logits, [cold, cold, greedy, greedy], [3, 3, 0, 0])
    assert ids.tolist() == expected


def test_edited_rows_and_log_probabilities_go_together_with_the_kernels(device):
    rng = random.Random(8)
    logits = draw_logits(rng, 8, 400).to(device)
    log = torch.tensor([3, 5, 3, 9], device=device)
    rows = []
    for index in range(8):
        s = draw_params(rng, 400)
        if index % 2:
            s = replace(s, repetition_penalty=1.5, logit_bias=((7, 4.0),), logprobs=3)
        rows.append(SampleRow(sampling=s, position=4, num_prompt_tokens=2, token_log=log))
    expected = sample(logits, rows)
    got = sample(logits, rows, choose_by(sample_rows), score)
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.is_broken, expected.is_broken)
    assert torch.equal(got.logprobs.ranks, expected.logprobs.ranks)
    assert torch.equal(got.logprobs.top_ids, expected.logprobs.top_ids)
    torch.testing.assert_close(got.logprobs.logprobs, expected.logprobs.logprobs)
    torch.testing.assert_close(got.logprobs.top_logprobs, expected.logprobs.top_logprobs)


def test_residents_are_drawn_from_the_table_unless_they_want_more_than_an_id(device):
    draws = ResidentDraws(4, device, sample_rows)
    params = [SamplingParams(top_p=0.9, seed=4), SamplingParams(seed=5), SamplingParams(logprobs=0)]
    draws.add(
        [
            NewRow(row=row, token_ids=(1,), num_prompt_tokens=1, sampling=s)
            for row, s in zip((3, 0, 2), params, strict=True)
        ]
    )
    logits = draw_logits(random.Random(6), 2, 200).to(device)
    where = torch.tensor([3, 0], device=device)
    plan = [
        PlanRow(row=row, start=4, num_tokens=1, logits_from=4, sample=True) for row in (3, 0, 2)
    ]
    assert draws.most(plan[:2]) == Draw.FILTERED
    token_ids, _ = draws.draw(logits, where, where + 5, Draw.FILTERED)
    assert token_ids.tolist() == reference(logits, params[:2], [8, 5])[0]
    assert draws.most(plan[1:2]) == Draw.PLAIN
    assert draws.most(plan) is None
    assert draws.most([replace(plan[0], mask_slot=0)]) is None
    assert draws.most([replace(plan[2], sample=False)]) == Draw.GREEDY


def test_masks_of_many_rows_are_applied_at_once(device):
    """What a card does in place of numpy, row by row."""
    generator = torch.Generator().manual_seed(1)
    for vocab_size in (31, 64, 100):
        logits = torch.randn(5, vocab_size, generator=generator).to(device)
        words = torch.randint(
            -(2**31), 2**31, (2, -(-vocab_size // 32)), generator=generator, dtype=torch.int64
        ).to(torch.int32)
        expected = logits.clone()
        for row, mask in zip((3, 1), words.tolist(), strict=True):
            for token_id in range(vocab_size):
                if not mask[token_id // 32] >> (token_id % 32) & 1:
                    expected[row, token_id] = -math.inf
        forbid_by_masks(logits, torch.tensor([3, 1], device=device), words.to(device))
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("vocab_size", [33, 5000])
def test_log_probabilities_equal_those_of_torch(vocab_size, device):
    rng = random.Random(vocab_size)
    logits = draw_logits(rng, 6, vocab_size)
    logits[0, 3], logits[1, 4] = math.nan, math.inf
    logits = logits.to(device)
    token_ids = torch.tensor([rng.randrange(vocab_size) for _ in range(6)], device=device)
    got = chosen_logprobs(logits, token_ids, 5, score)
    expected = chosen_logprobs(logits, token_ids, 5)
    assert torch.equal(got.ranks[1:], expected.ranks[1:])
    # The sum's logarithm, by the difference of two `exp` at most.
    for mine, theirs in (
        (got.logprobs, expected.logprobs),
        (got.top_logprobs, expected.top_logprobs),
    ):
        assert torch.equal(mine[:2].isnan(), theirs[:2].isnan())
        torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-6, atol=1e-6)
