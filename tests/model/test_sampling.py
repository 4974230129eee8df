"""The sampler against the reference, row by row, and what each parameter promises."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import distribution
from model.sampling.edits import SampleRow
from model.sampling.ranking import best, first_max
from model.sampling.sampler import Sampled, sample
from model.step import SamplingParams
from tests.model.sampling_reference import choose, to_mask

CLEAR = 1e-5


def row(
    *,
    log: Sequence[int] = (0,),
    num_prompt_tokens: int = 1,
    mask: torch.Tensor | None = None,
    **params: Any,
) -> SampleRow:
    return SampleRow(
        sampling=SamplingParams(**params),
        position=len(log),
        num_prompt_tokens=num_prompt_tokens,
        token_log=torch.tensor(log, dtype=torch.int32),
        mask=mask,
    )


def token_of(logits: Sequence[float] | torch.Tensor, sample_row: SampleRow) -> int:
    sampled = sample(torch.as_tensor(logits, dtype=torch.float32)[None], [sample_row])
    assert not bool(sampled.is_broken)
    return int(sampled.token_ids)


def tokens_at_positions(logits: Sequence[float], count: int, **params: Any) -> torch.Tensor:
    """Sample one distribution at positions 1, 2, ..., count."""
    matrix = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    rows = [replace(row(**params), position=1 + i) for i in range(count)]
    return sample(matrix, rows).token_ids


def random_logits(rng: np.random.Generator, vocab_size: int, is_tied: bool) -> np.ndarray:
    x = (rng.standard_normal(vocab_size) * rng.choice([0.5, 3.0, 8.0])).astype(np.float32)
    return np.round(x * 2) / 2 if is_tied else x


def random_row(rng: np.random.Generator, vocab_size: int) -> SampleRow:
    """Draw a row in which each parameter is off as often as it is on."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.4 else off

    def ids(most: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(0, vocab_size, rng.integers(1, most + 1)))

    log = ids(30)
    bad_words = ((log[-1], *ids(1)), (*log[-2:], *ids(1)), ids(1), (*ids(2), *ids(1)))
    return SampleRow(
        sampling=SamplingParams(
            temperature=float(rng.choice([0.0, 1e-3, 0.5, 0.8, 1.0, 1.5, 30.0])),
            top_k=maybe(int(rng.integers(1, 60)), 0),
            top_p=maybe(float(rng.uniform(0.01, 0.999)), 1.0),
            min_p=maybe(float(rng.choice([1e-4, 0.02, 0.3, 1.0])), 0.0),
            repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
            presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
            frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
            logit_bias=maybe(tuple((i, float(rng.uniform(-9, 9))) for i in set(ids(5))), ()),
            allowed_token_ids=maybe(ids(20), None),
            bad_words_token_ids=maybe(bad_words, ()),
            min_tokens=maybe(8, 0),
            stop_token_ids=frozenset(ids(3)),
            seed=int(rng.integers(0, 2**63)),
            choice=int(rng.integers(0, 4)),
            logprobs=maybe(int(rng.integers(0, 6)), None),
        ),
        position=len(log),
        num_prompt_tokens=int(rng.integers(1, len(log) + 1)),
        token_log=torch.tensor(log, dtype=torch.int32),
        mask=maybe(
            to_mask({int(i) for i in rng.integers(0, vocab_size, vocab_size)}, vocab_size), None
        ),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 7, 33, 100, 1003, 3000]),
    num_rows=st.integers(1, 6),
    is_tied=st.booleans(),
)
def test_rows_of_all_kinds_get_the_references_tokens(
    seed: int, vocab_size: int, num_rows: int, is_tied: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.stack([random_logits(rng, vocab_size, is_tied) for _ in range(num_rows)])
    rows = [random_row(rng, vocab_size) for _ in range(num_rows)]
    sampled = sample(torch.from_numpy(logits), rows)
    for index, sample_row in enumerate(rows):
        expected = choose(logits[index], sample_row)
        assert bool(sampled.is_broken[index]) == (expected.token_id is None)
        if expected.margin > CLEAR:
            assert int(sampled.token_ids[index]) == (expected.token_id or 0)


def test_most_random_rows_are_clear_enough_to_be_compared() -> None:
    rng = np.random.default_rng(0)
    choices = [choose(random_logits(rng, 300, False), random_row(rng, 300)) for _ in range(200)]
    assert sum(choice.margin > CLEAR for choice in choices) > 180


def one_of_each_kind(vocab_size: int) -> list[SampleRow]:
    """Return 33 rows that between them go every way there is through the sampler."""
    rng = np.random.default_rng(5)
    log = [int(i) for i in rng.integers(0, vocab_size, 40)]
    mask = to_mask({int(i) for i in rng.integers(0, vocab_size, 50)}, vocab_size)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 50},
        {"top_k": 1500},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 30.0},
        {"min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 5},
        {"logprobs": 20},
        {"logit_bias": ((3, 5.0),), "top_k": 5, "top_p": 0.5},
        {"allowed_token_ids": (1, 5, 7), "logprobs": 0},
        {"bad_words_token_ids": ((log[-1], 3), (4,)), "top_p": 0.99},
        {"min_tokens": 100, "stop_token_ids": frozenset({0, 1})},
    ]
    rows = [row(log=log, num_prompt_tokens=10, seed=1, **kind) for kind in kinds]
    rows.append(row(log=log[:9], num_prompt_tokens=3, mask=mask, seed=1))
    rows.append(row(log=log[:2], temperature=0.0, mask=mask))
    rows += [replace(r, sampling=replace(r.sampling, seed=2)) for r in rows]
    return rows[:33]


def assert_same_row(one: Sampled, index: int, other: Sampled, at: int, wanted: int | None) -> None:
    assert torch.equal(one.token_ids[index], other.token_ids[at])
    assert torch.equal(one.is_broken[index], other.is_broken[at])
    if wanted is not None:
        assert one.logprobs is not None
        assert other.logprobs is not None
        mine, others = one.logprobs, other.logprobs
        assert torch.equal(mine.logprobs[index], others.logprobs[at])
        assert torch.equal(mine.ranks[index], others.ranks[at])
        assert torch.equal(mine.top_ids[index, :wanted], others.top_ids[at, :wanted])
        assert torch.equal(mine.top_logprobs[index, :wanted], others.top_logprobs[at, :wanted])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("vocab_size", [4099, 50021])
def test_a_row_gets_the_same_bits_alone_and_in_every_batch(
    vocab_size: int, num_threads: int, full: bool
) -> None:
    rows = one_of_each_kind(vocab_size)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(rows), vocab_size, generator=generator) * 4
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [sample(logits[i : i + 1], [rows[i]]) for i in range(len(rows))]
    torch.set_num_threads(num_threads)
    try:
        sizes = range(1, 34) if full or vocab_size < 5000 else (1, 2, 3, 8, 17, 32, 33)
        for size in sizes:
            members = torch.randperm(len(rows), generator=generator)[:size].tolist()
            together = sample(logits[members], [rows[i] for i in members])
            for at, i in enumerate(members):
                assert_same_row(alone[i], 0, together, at, rows[i].sampling.logprobs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", [torch.exp, lambda x: torch.log(x.double().neg() + 1)])
def test_a_function_the_sampler_relies_on_does_not_care_where_a_number_stands(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    numbers = torch.linspace(-60, 0, 70001)
    together = function(numbers)
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 1001, 40003):
        for start in rng.integers(0, len(numbers) - length, 20).tolist():
            part = slice(start, start + length)
            assert torch.equal(function(numbers[part]), together[part])
            assert torch.equal(function(numbers[part].clone()), together[part])


@pytest.mark.parametrize("step", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("temperature", [0.7, 25.0])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_top_p_by_list_and_bins_is_top_p_by_sorting_everything(
    step: float, temperature: float, min_p: float
) -> None:
    num_rows, vocab_size = 40, 3001
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    logits = torch.round(logits / step) * step if step else logits
    sampling = [
        SamplingParams(temperature=temperature, min_p=min_p, top_p=(i + 1) / (num_rows + 1))
        for i in range(num_rows)
    ]
    numbers = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    filters = distribution._Filters.of(sampling, numbers, vocab_size)
    largest = logits.amax(-1, keepdim=True)
    by_list = distribution._draw_from_top_p(logits, largest, filters)
    by_sorting = distribution._draw_from_top_k(logits, largest, filters)
    assert torch.equal(by_list, by_sorting)


def test_the_best_come_in_falling_order_with_ties_by_id() -> None:
    generator = torch.Generator().manual_seed(4)
    for vocab_size in (1, 31, 32, 33, 1000, 4096, 20011):
        values = torch.randint(-4, 4, (3, vocab_size), generator=generator) / 2.0
        values[0, vocab_size // 2] = -0.0
        expected = values.sort(dim=-1, descending=True, stable=True).indices
        for count in {1, min(5, vocab_size), min(300, vocab_size), vocab_size}:
            assert torch.equal(best(values, count), expected[:, :count])
        assert torch.equal(first_max(values)[1], expected[:, 0])


def test_logits_are_not_modified() -> None:
    logits = torch.randn(33, 4099, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    sample(logits, one_of_each_kind(4099))
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 100), []).token_ids.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_is_broken_and_its_neighbours_are_not(bad: float) -> None:
    rows = one_of_each_kind(600)
    logits = torch.randn(33, 600, generator=torch.Generator().manual_seed(2))
    whole = sample(logits, rows)
    for victim in range(33):
        damaged = logits.clone()
        damaged[victim, 599] = bad
        sampled = sample(damaged, rows)
        others = [i for i in range(33) if i != victim]
        assert sampled.is_broken.nonzero()[:, 0].tolist() == [victim]
        assert int(sampled.token_ids[victim]) == 0
        assert torch.equal(sampled.token_ids[others], whole.token_ids[others])


def test_rows_of_nothing_but_nan_break_in_every_way_without_an_error() -> None:
    sampled = sample(torch.full((33, 600), math.nan), one_of_each_kind(600))
    assert bool(sampled.is_broken.all())
    assert not bool(sampled.token_ids.any())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"mask": torch.zeros(4, dtype=torch.int32)},
        {"allowed_token_ids": ()},
        {"allowed_token_ids": (100, -1, 1 << 40)},
        {"allowed_token_ids": (3,), "bad_words_token_ids": ((3,),), "logit_bias": ((3, 100.0),)},
    ],
)
def test_a_row_with_everything_forbidden_is_broken(
    params: dict[str, Any], temperature: float
) -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(2))
    sampled = sample(logits, [row(temperature=temperature, **params), row(temperature=0.0)])
    assert sampled.is_broken.tolist() == [True, False]
    assert int(sampled.token_ids[0]) == 0


def test_ids_outside_the_vocabulary_touch_no_neighbour() -> None:
    logits = torch.zeros(3, 10)
    wild = row(
        temperature=0.0,
        logit_bias=((10, 50.0), (-1, 50.0)),
        bad_words_token_ids=((10,), (0, 11)),
        min_tokens=5,
        stop_token_ids=frozenset({12}),
    )
    assert sample(logits, [wild] * 3).token_ids.tolist() == [0, 0, 0]


def test_seed_choice_and_position_each_change_the_tokens() -> None:
    logits = [0.0] * 1000
    base = tokens_at_positions(logits, 50, seed=1)
    assert torch.equal(base, tokens_at_positions(logits, 50, seed=1))
    assert len(set(base.tolist())) > 40
    for other in ({"seed": 2}, {"seed": 1 | 1 << 63}, {"seed": 1, "choice": 1}):
        assert int((tokens_at_positions(logits, 50, **other) == base).sum()) < 5


PEAKED = [math.log(0.5 ** (1 + i / 4)) for i in range(30)]


def keep_first(count: int) -> np.ndarray:
    p = np.exp(np.array(PEAKED))
    p[count:] = 0.0
    return p / p.sum()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, keep_first(30)),
        ({"top_k": 7}, keep_first(7)),
        ({"top_p": 0.6}, keep_first(6)),
        ({"top_p": 0.6, "top_k": 4}, keep_first(3)),
        ({"min_p": 0.25}, keep_first(9)),
        ({"min_p": 0.24, "top_p": 0.6, "top_k": 20}, keep_first(4)),
    ],
)
def test_tokens_are_distributed_as_the_filters_say(
    params: dict[str, Any], expected: np.ndarray
) -> None:
    count = 20000
    # The reversed order makes the best ids the highest, so that order of ids is not order of p.
    tokens = 29 - tokens_at_positions(PEAKED[::-1], count, seed=77, **params)
    seen = np.bincount(tokens.numpy(), minlength=30)
    kept = expected > 0
    assert not seen[~kept].any()
    statistic = ((seen[kept] - count * expected[kept]) ** 2 / (count * expected[kept])).sum()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_temperature_flattens_the_distribution_as_the_softmax_says() -> None:
    count = 20000
    tokens = tokens_at_positions(PEAKED, count, seed=78, temperature=2.5)
    p = np.exp(np.array(PEAKED) / 2.5)
    expected = count * p / p.sum()
    statistic = ((np.bincount(tokens.numpy(), minlength=30) - expected) ** 2 / expected).sum()
    assert statistic < 29 + 4 * math.sqrt(2 * 29)


def test_top_p_of_equal_tokens_keeps_the_lowest_ids_that_just_reach_it() -> None:
    for top_p, kept in ((0.3, 3), (0.5, 5), (0.7, 7), (0.9, 9), (0.91, 10)):
        tokens = tokens_at_positions([1.0] * 10, 500, top_p=top_p)
        assert set(tokens.tolist()) == set(range(kept))


def test_top_k_of_equal_tokens_keeps_exactly_k_of_the_lowest_ids() -> None:
    assert set(tokens_at_positions([1.0] * 100, 500, top_k=3).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    tokens = tokens_at_positions([1.0, 3.0, 2.99, -math.inf], 200, temperature=temperature)
    assert set(tokens.tolist()) == {1}


@pytest.mark.parametrize("temperature", [1e6, 1e300])
def test_a_huge_temperature_is_uniform_over_what_is_not_forbidden(temperature: float) -> None:
    logits = [9.0, -30.0, -math.inf, 4.0]
    tokens = tokens_at_positions(logits, 3000, temperature=temperature)
    counts = np.bincount(tokens.numpy(), minlength=4)
    assert counts[2] == 0
    assert counts[[0, 1, 3]].min() > 900


@pytest.mark.parametrize("top_p", [0.0, 1e-12])
def test_a_tiny_top_p_keeps_the_best_token(top_p: float) -> None:
    assert set(tokens_at_positions([1.0, 2.0, 2.0, 0.0], 100, top_p=top_p).tolist()) == {1}


def test_top_k_above_the_vocabulary_is_off() -> None:
    logits = [0.1 * i for i in range(50)]
    off = tokens_at_positions(logits, 200)
    assert torch.equal(tokens_at_positions(logits, 200, top_k=10**9), off)
    assert torch.equal(tokens_at_positions(logits, 200, top_k=50), off)


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.zeros(5000)
    logits[[7, 300, 4999]] = 1.0
    assert token_of(logits, row(temperature=0.0)) == 7


def test_a_bias_of_100_forces_and_of_minus_100_bans() -> None:
    logits = [5.0, 4.0, 3.0, -20.0]
    forced = tokens_at_positions(logits, 200, logit_bias=((3, 100.0),))
    banned = tokens_at_positions(logits, 200, logit_bias=((0, -100.0),))
    assert set(forced.tolist()) == {3}
    assert set(banned.tolist()) == {1, 2}


def test_stops_are_masked_until_min_tokens_were_generated() -> None:
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": {1}}
    logits = [0.0, 9.0, 5.0]
    assert token_of(logits, row(log=[0, 0, 0], num_prompt_tokens=3, **params)) == 2
    assert token_of(logits, row(log=[0, 0, 0, 2], num_prompt_tokens=3, **params)) == 2
    assert token_of(logits, row(log=[0, 0, 0, 2, 2], num_prompt_tokens=3, **params)) == 1


def test_a_bad_word_of_several_ids_is_stopped_at_its_last() -> None:
    params: dict[str, Any] = {"temperature": 0.0, "bad_words_token_ids": ((5, 6, 2), (2, 2, 2, 2))}
    logits = [0.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    assert token_of(logits, row(log=[3, 5, 6], **params)) == 1
    assert token_of(logits, row(log=[3, 6, 5], **params)) == 2
    assert token_of(logits, row(log=[6], **params)) == 2


def test_two_bad_words_with_one_last_id_forbid_it_if_either_matches() -> None:
    words = ((5, 2), (6, 2))
    logits = [0.0, 1.0, 9.0]
    for last in (5, 6):
        params: dict[str, Any] = {"temperature": 0.0, "bad_words_token_ids": words}
        assert token_of(logits, row(log=[last], **params)) == 1


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = [3.0, 2.5, 0.0]
    log = [0, 0, 0, 1, 1]
    at_two = row(log=log, num_prompt_tokens=3, temperature=0.0, frequency_penalty=-0.4)
    assert token_of(logits, at_two) == 1
    prompt_only = row(log=log, num_prompt_tokens=5, temperature=0.0, presence_penalty=2.0)
    assert token_of(logits, prompt_only) == 0


def test_repetition_penalty_covers_the_prompt() -> None:
    logits = [3.0, 2.5, -1.0]
    assert token_of(logits, row(log=[0], temperature=0.0, repetition_penalty=1.5)) == 1


def test_an_id_without_weight_is_not_drawn_even_by_the_smallest_number() -> None:
    weights = torch.tensor([[0, 0, 5, 0, 5, 0]])
    for number, index in ((0.0, 2), (0.5, 4), (1 - 2.0**-53, 4)):
        numbers = torch.tensor([[number]], dtype=torch.float64)
        assert int(distribution._invert(weights, numbers)) == index


def test_a_top_p_of_k_out_of_n_equal_tokens_is_reached_by_k_of_them() -> None:
    one = 1 << distribution.WEIGHT_BITS
    for n in range(2, 60):
        top_ps = torch.tensor([[k / n] for k in range(1, n)], dtype=torch.float64)
        total = torch.full((n - 1, 1), n * one)
        expected = [[k * one] for k in range(1, n)]
        assert distribution._to_reach(total, top_ps).tolist() == expected


def test_a_weight_does_not_depend_on_where_its_logit_stands() -> None:
    logits = torch.linspace(-50, 0, 5003)[None]
    largest = torch.zeros(1, 1)
    _, together = distribution.weigh(logits, largest, 1.0)
    for start in range(300):
        _, alone = distribution.weigh(logits[:, start : start + 4001], largest, 1.0)
        assert torch.equal(alone, together[:, start : start + 4001])
