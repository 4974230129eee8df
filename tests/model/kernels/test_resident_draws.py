"""A runner that samples by kernels against one that samples in torch, over the same network."""

from dataclasses import replace

import pytest
import torch

from model.kernels.sample import sample_rows
from model.operations import triton_runner_kernels
from model.runner import ModelRunner
from model.step import SamplingParams
from tests.model.drive import load_network, make_limits
from tests.model.test_runner import request, serve, tokens
from tests.toy import write_toy_checkpoint

SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=6),
    SamplingParams(temperature=0.9, seed=1, top_p=0.8, max_tokens=3),
    SamplingParams(temperature=0.9, seed=2, repetition_penalty=1.3, max_tokens=5),
    SamplingParams(temperature=1.5, seed=3, top_k=7, max_tokens=4, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.1, seed=2**63 + 9, min_p=0.01, max_tokens=6),
    SamplingParams(seed=8, min_tokens=3, stop_token_ids=frozenset({5}), max_tokens=5),
]


def generated(folder, num_seqs: int, *, warm: bool = False) -> dict[tuple[str, int], list[int]]:
    config, network = load_network(folder)
    runner = ModelRunner(network, make_limits(config, num_seqs), torch.device("cpu"))
    if warm:
        runner.warm_up()
    requests = [
        request(str(number), [3 + (5 * number + place) % 40 for place in range(4 + number)], each)
        for number, each in enumerate(SAMPLINGS)
    ]
    outputs, _ = serve(runner, requests, late=2)
    return {key: tokens(each) for key, each in outputs.items()}


@pytest.mark.parametrize("num_seqs", [2, 6])
def test_tokens_are_those_of_torch(num_seqs, tmp_path, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a card's runner takes the kernels by itself")
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=64)
    expected = generated(folder, num_seqs)
    calls = []

    def counted(logits, rows, positions, table, most):
        calls.append(len(rows))
        return sample_rows(logits, rows, positions, table, most)

    kernels = replace(triton_runner_kernels(), sample_rows=counted)
    monkeypatch.setattr("model.runner.choose_runner_kernels", lambda _device: kernels)
    got = generated(folder, num_seqs, warm=True)
    assert got == expected
    assert sum(map(len, got.values())) > 20
    assert len(calls) > 5
