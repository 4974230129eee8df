"""The runner under the real scheduler: right tokens whatever the pool, the company and the seed.

Sequences that run alone, each in a fresh runner, say what is right.
"""

import random
from dataclasses import replace

import pytest
import torch

from app.engine.client import EngineRequest, SequenceOutput
from app.engine.drafts import NgramSpeculation
from app.engine.scheduler import Scheduler
from model.config import LoadOptions
from model.kv_pool import KVPool
from model.llama import LlamaNetwork
from model.runner import ModelRunner
from model.step import (
    NewRow,
    PlanRow,
    RowResult,
    RunnerLimits,
    SamplingParams,
    StepPlan,
)
from model.weights.checkpoint import open_checkpoint
from tests.toy import write_toy_checkpoint

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_toy_checkpoint(tmp_path_factory.mktemp("toy"), max_position_embeddings=256)
    return open_checkpoint(LoadOptions(model=str(folder)))


def make_runner(checkpoint, **overrides) -> ModelRunner:
    values = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "block_size": 4,
        "num_blocks": 200,
        "vocab_size": checkpoint.config.vocab_size,
    }
    limits = RunnerLimits(**{**values, **overrides})
    pool = KVPool(
        checkpoint.config,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        dtype=torch.float32,
        device=CPU,
    )
    with torch.inference_mode():
        network = LlamaNetwork(checkpoint.config, checkpoint.read, pool, limits.max_model_len)
    return ModelRunner(network, limits, CPU)


def serve(runner, requests, *, late: int = 0, enable_prefix_caching: bool = True, speculation=None):
    """Run requests to their end; `late` of them come one a step. Return outputs by request."""
    scheduler = Scheduler(
        runner.limits, enable_prefix_caching=enable_prefix_caching, speculation=speculation
    )
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    waiting = list(requests)
    while waiting or scheduler.running or scheduler.waiting:
        for _ in range(max(1, len(waiting) - late)):
            if waiting:
                scheduler.add(waiting.pop(0))
        step = scheduler.schedule()
        if step is None:
            continue
        handle = runner.launch(step.plan, lambda buffers: None)
        for update in scheduler.update(step, runner.collect(handle)):
            key = (update.sequence.request.request_id, update.sequence.index)
            outputs.setdefault(key, []).append(update.output)
        scheduler.check_integrity()
    assert scheduler.allocator.num_free == runner.limits.num_blocks
    return outputs, scheduler


def request(name: str, prompt: list[int], *sampling: SamplingParams, **fields) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling or (GREEDY,), **fields
    )


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def logprobs(outputs: list[SequenceOutput]) -> list[tuple[float, tuple[float, ...]]]:
    return [(entry.logprob, entry.top_logprobs) for output in outputs for entry in output.logprobs]


def random_requests(rng: random.Random, vocab_size: int, count: int) -> list[EngineRequest]:
    """Prompts that often begin alike, with every kind of sampling."""
    beginnings = [[rng.randrange(vocab_size) for _ in range(20)] for _ in range(2)]
    requests = []
    for number in range(count):
        prompt = rng.choice(beginnings)[: rng.randint(0, 20)]
        prompt = prompt + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))]
        sampling = [
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.0]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([1.0, 0.8]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                presence_penalty=rng.choice([0.0, 0.5]),
                seed=number,
                choice=choice,
                max_tokens=rng.randint(1, 16),
                logprobs=2,
            )
            for choice in range(rng.choice([1, 1, 3]))
        ]
        requests.append(request(str(number), prompt, *sampling))
    return requests


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("roomy", {}),
        ("small pool", {"num_blocks": 32}),
        ("small budget", {"max_num_batched_tokens": 9}),
        ("one row", {"max_num_seqs": 1}),
        ("large blocks", {"block_size": 16, "num_blocks": 24}),
    ],
)
def test_tokens_and_logprobs_are_bitwise_those_of_a_sequence_alone(checkpoint, name, limits, full):
    rng = random.Random(name)
    vocab_size = checkpoint.config.vocab_size
    requests = random_requests(rng, vocab_size, 40 if full else 8)
    together, scheduler = serve(make_runner(checkpoint, **limits), requests, late=4)
    if name == "small pool":
        assert scheduler.counters.num_preemptions > 0
    assert scheduler.counters.prefix_cache_hits > 0
    for each in requests:
        for index, sampling in enumerate(each.sampling):
            lone = request("lone", list(each.prompt_token_ids), sampling)
            alone, _ = serve(make_runner(checkpoint), [lone], enable_prefix_caching=False)
            got = together[each.request_id, index]
            assert tokens(got) == tokens(alone["lone", 0])
            assert logprobs(got) == logprobs(alone["lone", 0])


@pytest.mark.parametrize("num_blocks", [200, 40])
def test_guessing_ahead_changes_no_token_and_no_logprob(checkpoint, num_blocks, full):
    rng = random.Random(num_blocks)
    speculation = NgramSpeculation(
        num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1
    )
    requests = []
    for each in random_requests(rng, checkpoint.config.vocab_size, 30 if full else 8):
        # Few ids to choose from, so that the same words come again.
        allowed = tuple(rng.sample(range(5, checkpoint.config.vocab_size), 3))
        sampling = [
            replace(
                own,
                allowed_token_ids=allowed,
                max_tokens=24,
                logit_bias=((allowed[0], 0.5),),
                bad_words_token_ids=((allowed[0], allowed[1], allowed[1]),),
            )
            for own in each.sampling
        ]
        requests.append(replace(each, sampling=tuple(sampling)))
    plain, _ = serve(make_runner(checkpoint, num_blocks=num_blocks), requests, late=2)
    runner = make_runner(checkpoint, num_blocks=num_blocks)
    guessed, scheduler = serve(runner, requests, late=2, speculation=speculation)
    assert scheduler.counters.num_accepted_tokens > 20
    for key, outputs in plain.items():
        assert tokens(guessed[key]) == tokens(outputs)
        assert logprobs(guessed[key]) == logprobs(outputs)


def test_prompt_logprobs_are_those_of_the_same_tokens_in_any_chunks(checkpoint):
    rng = random.Random(5)
    prompt = [rng.randrange(checkpoint.config.vocab_size) for _ in range(90)]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3)
    entries = []
    for budget in (128, 17):
        runner = make_runner(checkpoint, max_num_batched_tokens=budget)
        lone = request("a", prompt, sampling, read_prefix_cache=False)
        outputs, _ = serve(runner, [lone])
        entries.append([e for output in outputs["a", 0] for e in output.prompt_logprobs])
    assert [entry.token_id for entry in entries[0]] == prompt[1:]
    assert entries[0] == entries[1]
    assert all(len(entry.top_ids) == 3 for entry in entries[0])


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=1.0, seed=3, max_tokens=12),
        SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=4, max_tokens=12),
    ],
)
def test_drafts_are_accepted_up_to_the_first_wrong_one(checkpoint, sampling):
    prompt = [5, 6, 7, 8]
    right = tokens(serve(make_runner(checkpoint), [request("a", prompt, sampling)])[0]["a", 0])
    drafts = (right[1], right[2], (right[3] + 1) % checkpoint.config.vocab_size, 9)
    runner = make_runner(checkpoint)

    def step(number: int, added: tuple[NewRow, ...], row: PlanRow) -> RowResult:
        plan = StepPlan(step_id=number, added=added, rows=(row,))
        return runner.collect(runner.launch(plan, lambda buffers: None)).rows[0]

    new = NewRow(row=0, token_ids=tuple(prompt), num_prompt_tokens=4, sampling=sampling)
    first = PlanRow(
        row=0, start=0, num_tokens=4, new_block_ids=(0, 1, 2), logits_from=3, sample=True
    )
    assert step(0, (new,), first).token_ids == (right[0],)
    verify = PlanRow(
        row=0, start=4, num_tokens=5, logits_from=4, sample=True, draft_token_ids=drafts
    )
    assert list(step(1, (), verify).token_ids) == right[1:4]
    after = PlanRow(row=0, start=7, num_tokens=1, logits_from=7, sample=True)
    assert list(step(2, (), after).token_ids) == right[4:5]


def test_mask_filled_by_a_constraint_decides_what_is_sampled(checkpoint):
    runner = make_runner(checkpoint)
    new = NewRow(row=3, token_ids=(5, 6), num_prompt_tokens=2, sampling=GREEDY)
    row = PlanRow(
        row=3, start=0, num_tokens=2, new_block_ids=(7,), logits_from=1, sample=True, mask_slot=0
    )
    seen = []

    def fill(buffers):
        words = buffers[0]
        seen.append(all(word == 0xFFFFFFFF for word in words))
        for index in range(len(words)):
            words[index] = 0
        words[2] = 1 << 9

    plan = StepPlan(step_id=0, added=(new,), rows=(row,), num_mask_slots=1)
    result = runner.collect(runner.launch(plan, fill))
    assert seen == [True]
    assert result.rows[0].token_ids == (2 * 32 + 9,)


def test_row_without_finite_logits_reports_an_error_and_its_neighbour_does_not(checkpoint):
    runner = make_runner(checkpoint)
    prompts = [[1, 2, 3], [9, 8, 7]]
    expected = tokens(serve(make_runner(checkpoint), [request("b", prompts[1])])[0]["b", 0])[0]
    new = [
        NewRow(row=row, token_ids=tuple(prompt), num_prompt_tokens=3, sampling=GREEDY)
        for row, prompt in enumerate(prompts)
    ]
    rows = [
        PlanRow(row=row, start=0, num_tokens=3, new_block_ids=(row,), logits_from=2, sample=True)
        for row in range(2)
    ]
    network = runner._network
    original = network.compute_logits

    def broken(hidden):
        logits = original(hidden)
        logits[0, 5] = torch.nan
        return logits

    network.compute_logits = broken
    plan = StepPlan(step_id=0, added=tuple(new), rows=tuple(rows))
    results = runner.collect(runner.launch(plan, lambda buffers: None)).rows
    assert results[0].error
    assert results[0].token_ids == ()
    assert results[1].token_ids == (expected,)


def test_plan_that_only_removes_gives_an_empty_result(checkpoint):
    runner = make_runner(checkpoint)
    plan = StepPlan(step_id=7, removed=(2, 5))
    result = runner.collect(runner.launch(plan, lambda buffers: None))
    assert result.step_id == 7
    assert result.rows == ()


def test_step_launched_before_the_last_is_collected_reads_its_token_from_the_log(checkpoint):
    prompt = [5, 6, 7, 8]
    right = tokens(serve(make_runner(checkpoint), [request("a", prompt)])[0]["a", 0])
    runner = make_runner(checkpoint, max_inflight=2)
    new = NewRow(row=0, token_ids=tuple(prompt), num_prompt_tokens=4, sampling=GREEDY)
    row = PlanRow(
        row=0, start=0, num_tokens=4, new_block_ids=(0, 1, 2, 3), logits_from=3, sample=True
    )
    handles = [runner.launch(StepPlan(step_id=0, added=(new,), rows=(row,)), lambda buffers: None)]
    got = []
    for start in range(4, 4 + len(right) - 1):
        row = PlanRow(row=0, start=start, num_tokens=1, logits_from=start, sample=True)
        plan = StepPlan(step_id=start, rows=(row,))
        handles.append(runner.launch(plan, lambda buffers: None))
        got.extend(runner.collect(handles.pop(0)).rows[0].token_ids)
    got.extend(runner.collect(handles.pop(0)).rows[0].token_ids)
    assert got == right


def test_prompt_without_finite_logits_is_an_error_before_anything_is_sampled(checkpoint):
    runner = make_runner(checkpoint)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    new = NewRow(row=0, token_ids=(1, 2, 3, 4), num_prompt_tokens=4, sampling=sampling)
    row = PlanRow(row=0, start=0, num_tokens=2, new_block_ids=(0,), logits_from=0, sample=False)
    network = runner._network
    original = network.compute_logits
    network.compute_logits = lambda hidden: original(hidden) * torch.nan
    plan = StepPlan(step_id=0, added=(new,), rows=(row,))
    result = runner.collect(runner.launch(plan, lambda buffers: None)).rows[0]
    assert result.error
    assert result.prompt_logprobs == ()
