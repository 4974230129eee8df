"""The sampler against the reference, row by row, and what each parameter promises."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling.edits import SampleRow
from model.sampling.sampler import sample
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
