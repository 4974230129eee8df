"""What is served on a card: kernels against torch, graphs against launches, one step ahead.

Needs torch, triton, numpy, safetensors, tokenizers and pytest. Elsewhere the same code runs in
Triton's interpreter (tests/model/kernels), but for what only a card has: graphs, streams, events.
"""

import random
from collections import deque

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)
pytest.importorskip("triton")

from app.engine.scheduler import Scheduler
from model.config import LoadOptions
from model.loader import ModelInfo, load_runner
from model.runner import ModelRunner
from model.step import SamplingParams, StepPlan
from tests.model.test_runner import random_requests, request
from tests.toy import write_toy_checkpoint

NEAR_TIE = 0.05  # of logits whose standard deviation is about 3: twice what bfloat16 rounds off
MODELS = {
    "grouped heads": {},
    "heads of 64": {"head_dim": 64},
    "heads of 128, tied": {"head_dim": 128, "tie_word_embeddings": True},
    "one key head": {"num_key_value_heads": 1, "head_dim": 32},
}


def load(folder, **options) -> tuple[ModelInfo, ModelRunner]:
    values = {
        "device": "cuda",
        "dtype": "bfloat16",
        "max_num_seqs": 12,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 1 << 24,
    }
    return load_runner(LoadOptions(model=str(folder), **{**values, **options}))


def serve(runner: ModelRunner, requests) -> dict[tuple[str, int], list]:
    """Run requests to their end, launching steps as far ahead as the runner can."""
    scheduler = Scheduler(runner.limits)
    for each in requests:
        scheduler.add(each)
    outputs: dict[tuple[str, int], list] = {}
    inflight = deque()
    while inflight or scheduler.running or scheduler.waiting:
        while len(inflight) < runner.limits.max_inflight and (step := scheduler.schedule()):
            inflight.append((step, runner.launch(step.plan, lambda buffers: None)))
        if not inflight:
            continue
        step, handle = inflight.popleft()
        for update in scheduler.update(step, runner.collect(handle)):
            assert update.output.error is None
            key = (update.sequence.request.request_id, update.sequence.index)
            outputs.setdefault(key, []).append(update.output)
    assert scheduler.allocator.num_free == runner.limits.num_blocks
    everybody = tuple(range(runner.limits.max_num_seqs))
    runner.launch(StepPlan(step_id=-1, removed=everybody, added=(), rows=()), lambda buffers: None)
    return outputs


def token_ids(outputs) -> dict[tuple[str, int], list[int]]:
    return {
        key: [token_id for output in each for token_id in output.token_ids]
        for key, each in outputs.items()
    }


def first_gap(got, expected) -> tuple[int, float] | None:
    """Return where two answers part, and how far apart the two best logits were there."""
    entries = [entry for output in expected for entry in output.logprobs]
    ours = [token_id for output in got for token_id in output.token_ids]
    theirs = [token_id for output in expected for token_id in output.token_ids]
    for place, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            best, second = entries[place].top_logprobs[:2]
            return place, best - second
    return None


def greedy_requests(vocab_size: int, count: int, max_tokens: int = 40):
    rng = random.Random(5)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=2)
    prompts = [[rng.randrange(5, vocab_size) for _ in range(rng.randint(1, 70))]
               for _ in range(count)]  # fmt: skip
    return [request(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_are_those_of_torch_up_to_near_ties(name, tmp_path, monkeypatch):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=256, **MODELS[name])
    info, runner = load(folder)
    requests = greedy_requests(info.config.vocab_size, 12)
    got = serve(runner, requests)
    monkeypatch.setattr("model.operations._why_not_triton", lambda _device: "torch is wanted")
    expected = serve(load(folder)[1], requests)
    gaps = [gap for key in expected if (gap := first_gap(got[key], expected[key])) is not None]
    assert all(gap < NEAR_TIE for _, gap in gaps), gaps
    assert len(gaps) < len(expected) // 2, gaps


def test_float32_ids_are_those_of_torch(tmp_path, monkeypatch):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=256)
    info, runner = load(folder, dtype="float32")
    requests = greedy_requests(info.config.vocab_size, 8)
    got = token_ids(serve(runner, requests))
    monkeypatch.setattr("model.operations._why_not_triton", lambda _device: "torch is wanted")
    assert got == token_ids(serve(load(folder, dtype="float32")[1], requests))


def plain_requests(vocab_size: int):
    """Greedy and sampled, nobody with penalties or log-probabilities: all is drawn in graphs."""
    rng = random.Random(2)
    ways = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 8, "min_p": 0.02}]
    return [
        request(
            str(number),
            [rng.randrange(5, vocab_size) for _ in range(rng.randint(1, 40))],
            SamplingParams(seed=number, max_tokens=rng.randint(2, 50), **ways[number % 4]),
        )
        for number in range(30)
    ]


def test_graphs_and_launches_give_the_same_tokens(tmp_path):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=256)
    info, eager = load(folder, enforce_eager=True)
    requests = plain_requests(info.config.vocab_size)
    requests += random_requests(random.Random(3), info.config.vocab_size, 8)
    requests = [request(f"{at}", list(each.prompt_token_ids), *each.sampling)
                for at, each in enumerate(requests)]  # fmt: skip
    expected = token_ids(serve(eager, requests))
    _, runner = load(folder)
    assert token_ids(serve(runner, requests)) == expected  # some steps find graphs, some do not
    assert runner.capture_all() > 2
    assert token_ids(serve(runner, requests)) == expected


def test_a_decode_step_waits_for_nothing(tmp_path):
    _, runner = load(write_toy_checkpoint(tmp_path, max_position_embeddings=256))
    serve(runner, plain_requests(300))
    runner.capture_all()
    scheduler = Scheduler(runner.limits)
    for number in range(3):
        sampling = SamplingParams(temperature=0.5, seed=number, max_tokens=40)
        scheduler.add(request(str(number), [7, 8, 9 + number], sampling))
    steps = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step = scheduler.schedule()
            assert step is not None
            steps.append((step, runner.launch(step.plan, lambda buffers: None)))
            if len(steps) == 2:
                oldest, handle = steps.pop(0)
                scheduler.update(oldest, runner.collect(handle))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scheduler.running


def test_what_is_taken_keeps_to_the_plan(tmp_path):
    folder = write_toy_checkpoint(tmp_path, max_position_embeddings=256)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    info, runner = load(folder, max_num_seqs=64, max_num_batched_tokens=2048)
    torch.cuda.reset_peak_memory_stats()
    serve(runner, plain_requests(info.config.vocab_size))
    runner.capture_all()
    assert torch.cuda.max_memory_reserved() - before <= info.plan.planned_bytes
