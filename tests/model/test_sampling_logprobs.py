"""Log-probabilities, ranks and alternatives against a softmax in float64."""

import numpy as np
import pytest
import torch

from model.sampling.edits import SampleRow
from model.sampling.logprobs import chosen_logprobs, to_token_logprobs
from model.sampling.sampler import sample
from model.step import SamplingParams, TokenLogprobs
from tests.model.sampling_reference import log_softmax


@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
@pytest.mark.parametrize("vocab_size", [1, 40, 33001])
def test_logprobs_are_the_log_softmax(scale: float, vocab_size: int) -> None:
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(1)) * scale
    ids = torch.arange(9) % vocab_size
    found = chosen_logprobs(logits, ids, min(3, vocab_size))
    for index in range(9):
        expected = log_softmax(logits[index].numpy())
        np.testing.assert_allclose(
            found.logprobs[index], expected[ids[index]], atol=1e-5, rtol=1e-6
        )
        best = np.argsort(-expected, kind="stable")[:3]
        np.testing.assert_allclose(found.top_logprobs[index], expected[best], atol=1e-5, rtol=1e-6)


def test_ranks_count_greater_logits_and_equal_ones_of_a_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 1.0]]).expand(5, -1)
    found = chosen_logprobs(logits, torch.arange(5), 5)
    assert found.ranks.tolist() == [4, 1, 3, 2, 5]
    assert found.top_ids[0].tolist() == [1, 3, 2, 0, 4]


def test_more_alternatives_than_ids_are_all_ids() -> None:
    found = chosen_logprobs(torch.zeros(2, 3), torch.tensor([1, 2]), 20)
    assert found.top_ids.tolist() == [[0, 1, 2]] * 2


def test_no_tokens_give_empty_reports() -> None:
    found = chosen_logprobs(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), 2)
    assert found.logprobs.shape == (0,)
    assert found.top_ids.shape == (0, 2)


def test_logprobs_of_a_sampled_token_are_those_of_the_unmodified_logits() -> None:
    logits = torch.tensor([[4.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    forced = SampleRow(
        sampling=SamplingParams(temperature=0.5, logit_bias=((2, 100.0),), logprobs=1),
        position=1,
        num_prompt_tokens=1,
        token_log=torch.tensor([0]),
    )
    silent = SampleRow(
        sampling=SamplingParams(), position=1, num_prompt_tokens=1, token_log=torch.tensor([0])
    )
    sampled = sample(logits, [silent, forced])
    assert sampled.logprobs is not None
    reported = to_token_logprobs(sampled.logprobs.download(), 1, int(sampled.token_ids[1]), 1)
    expected = log_softmax(logits[1].numpy())
    assert reported == TokenLogprobs(
        token_id=2,
        logprob=pytest.approx(expected[2]),
        rank=1,
        top_ids=(2,),
        top_logprobs=(pytest.approx(expected[2]),),
    )


def test_nothing_is_reported_if_no_row_asks() -> None:
    silent = SampleRow(
        sampling=SamplingParams(), position=1, num_prompt_tokens=1, token_log=torch.tensor([0])
    )
    assert sample(torch.zeros(1, 5), [silent]).logprobs is None
