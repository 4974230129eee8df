"""One behaviour of the scheduler at a time, against a runner that checks every plan."""

import pytest

from model.step import SamplingParams
from tests.engine.drive import VOCAB, Driver, Script, make_limits
from tests.fake_runner import FakeRunner, expected_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPT = list(range(1, 11))


def plan_sizes(runner: FakeRunner) -> list[list[int]]:
    return [[row.num_tokens for row in plan.rows] for plan in runner.plans]


def test_sequence_yields_exactly_what_the_model_says():
    driver = Driver(make_limits())
    driver.submit("a", PROMPT, GREEDY)
    driver.run()
    assert driver.tokens("a") == expected_tokens(PROMPT, GREEDY, VOCAB)
    assert driver.reasons("a") == ["length"]


def test_long_prompt_is_computed_in_chunks_of_the_budget():
    driver = Driver(make_limits(max_num_batched_tokens=8))
    driver.submit("a", list(range(20)), SamplingParams(max_tokens=1))
    driver.run()
    assert plan_sizes(driver.runner) == [[8], [8], [4]]


def test_chunk_that_is_not_the_last_ends_with_a_full_block():
    driver = Driver(make_limits(max_num_batched_tokens=7))
    driver.submit("a", list(range(20)), SamplingParams(max_tokens=1))
    driver.run()
    assert plan_sizes(driver.runner) == [[4], [4], [4], [4], [4]]


def test_long_prompt_does_not_hold_up_a_sequence_that_streams():
    driver = Driver(make_limits(max_num_batched_tokens=8))
    driver.submit("a", [1, 2], SamplingParams(temperature=0.0, max_tokens=8))
    driver.round()
    driver.submit("b", list(range(30)), GREEDY)
    for _ in range(4):
        driver.round()
    assert len(driver.tokens("a")) == 5, "a token in every step, prompt or no prompt"


def test_older_long_prompt_leaves_a_token_for_younger_streams():
    driver = Driver(make_limits(max_num_batched_tokens=8))
    driver.submit("old", list(range(60)), SamplingParams(max_tokens=1))
    driver.submit("young", [1, 2], GREEDY)
    for _ in range(9):
        driver.round()
    streaming = [sizes for sizes in plan_sizes(driver.runner) if len(sizes) == 2]
    assert all(sizes[1] <= 2 for sizes in streaming)
    driver.run()
    assert driver.tokens("young") == expected_tokens([1, 2], GREEDY, VOCAB)


def test_prompt_and_decode_share_a_step():
    driver = Driver(make_limits())
    driver.submit("a", PROMPT, GREEDY)
    driver.round()
    driver.submit("b", PROMPT[::-1], GREEDY)
    driver.round()
    assert plan_sizes(driver.runner)[1] == [1, 10]


def test_stop_token_ends_a_sequence_and_is_its_last():
    tokens = expected_tokens(PROMPT, GREEDY, VOCAB)
    driver = Driver(make_limits())
    sampling = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=frozenset({tokens[2]}))
    driver.submit("a", PROMPT, sampling)
    driver.run()
    assert driver.tokens("a") == tokens[:3]
    assert driver.reasons("a") == ["stop"]
    assert driver.outputs["a", 0][-1].stop_token_id == tokens[2]


def test_stop_token_does_not_end_a_sequence_before_min_tokens():
    tokens = expected_tokens(PROMPT, GREEDY, VOCAB)
    driver = Driver(make_limits())
    sampling = SamplingParams(
        temperature=0.0, max_tokens=6, min_tokens=4, stop_token_ids=frozenset({tokens[2]})
    )
    driver.submit("a", PROMPT, sampling)
    driver.run()
    assert len(driver.tokens("a")) > 3


def test_no_tokens_wanted_computes_the_prompt_and_samples_nothing():
    driver = Driver(make_limits(max_num_batched_tokens=4))
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=1)
    driver.submit("a", PROMPT, sampling, read_prefix_cache=False)
    driver.run()
    assert driver.tokens("a") == []
    assert driver.reasons("a") == ["length"]
    assert not any(row.sample for plan in driver.runner.plans for row in plan.rows)


def test_prompt_logprobs_come_once_for_each_token_after_the_first():
    driver = Driver(make_limits(max_num_batched_tokens=4))
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=1)
    driver.submit("a", PROMPT, sampling, read_prefix_cache=False)
    driver.run()
    entries = [entry.token_id for out in driver.outputs["a", 0] for entry in out.prompt_logprobs]
    assert entries == PROMPT[1:]


def test_repeated_prompt_is_taken_from_the_cache_but_for_its_last_token():
    driver = Driver(make_limits())
    driver.submit("a", PROMPT[:8], GREEDY)
    driver.run()
    driver.submit("b", PROMPT[:8], GREEDY)
    driver.run()
    assert driver.cached("a") == 0
    assert driver.cached("b") == 4
    assert driver.tokens("b") == driver.tokens("a")


def test_generated_tokens_are_reused_as_the_prefix_of_a_later_prompt():
    driver = Driver(make_limits())
    driver.submit("a", PROMPT, GREEDY)
    driver.run()
    conversation = PROMPT + driver.tokens("a") + [7]
    driver.submit("b", conversation, GREEDY)
    driver.run()
    assert driver.cached("b") == 12
    assert driver.tokens("b") == expected_tokens(conversation, GREEDY, VOCAB)


@pytest.mark.parametrize("other", [{"cache_salt": "x"}, {"read_prefix_cache": False}])
def test_nothing_is_taken_from_the_cache_across_salts_or_when_not_wanted(other):
    driver = Driver(make_limits())
    driver.submit("a", PROMPT, GREEDY)
    driver.run()
    driver.submit("b", PROMPT, GREEDY, **other)
    driver.run()
    assert driver.cached("b") == 0


def test_prefix_caching_switched_off_finds_nothing():
    driver = Driver(make_limits(), enable_prefix_caching=False)
    for name in ("a", "b"):
        driver.submit(name, PROMPT, GREEDY)
        driver.run()
    assert driver.cached("b") == 0


def test_choices_of_one_request_compute_their_prompt_once():
    driver = Driver(make_limits(max_num_batched_tokens=32))
    sampling = [SamplingParams(seed=3, choice=choice, max_tokens=5) for choice in range(4)]
    driver.submit("a", list(range(12)), *sampling)
    driver.run()
    assert plan_sizes(driver.runner)[0] == [12, 4, 4, 4]
    for choice in range(4):
        assert driver.tokens("a", choice) == expected_tokens(
            list(range(12)), sampling[choice], VOCAB
        )


def test_same_long_prompt_sent_twice_at_once_is_computed_once_between_them():
    driver = Driver(make_limits(max_num_batched_tokens=8))
    prompt = list(range(40))
    for name in ("a", "b"):
        driver.submit(name, prompt, SamplingParams(temperature=0.0, max_tokens=1))
    driver.run()
    computed = sum(sum(sizes) for sizes in plan_sizes(driver.runner))
    assert computed <= 40 + 8


def test_pool_that_is_too_small_preempts_the_youngest_and_loses_nothing():
    driver = Driver(make_limits(num_blocks=8, max_model_len=32))
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    for name in ("a", "b", "c"):
        driver.submit(name, [ord(name)] * 6, sampling)
    driver.run()
    assert driver.scheduler.counters.num_preemptions > 0
    for name in ("a", "b", "c"):
        assert driver.tokens(name) == expected_tokens([ord(name)] * 6, sampling, VOCAB)


def test_oldest_sequence_is_never_preempted():
    driver = Driver(make_limits(num_blocks=8, max_model_len=32))
    sampling = SamplingParams(temperature=0.0, max_tokens=20)
    requests = [driver.submit(name, [ord(name)] * 6, sampling) for name in ("a", "b", "c")]
    driver.run()
    assert requests[0].sequences[0].num_preemptions == 0


def test_urgent_request_overtakes_those_that_wait():
    driver = Driver(make_limits(max_num_seqs=1))
    driver.submit("running", PROMPT, GREEDY)
    driver.round()
    driver.submit("later", PROMPT[1:], GREEDY)
    driver.submit("urgent", PROMPT[2:], GREEDY, priority=-1)
    driver.run()
    assert list(driver.outputs) == [("running", 0), ("urgent", 0), ("later", 0)]


def test_aborted_sequence_gives_its_blocks_back_at_once():
    driver = Driver(make_limits())
    request = driver.submit("a", PROMPT, GREEDY)
    driver.round()
    driver.scheduler.finish(request.sequences[0], "abort")
    driver.scheduler.check_integrity()
    assert driver.scheduler.allocator.num_free == 32
    driver.run()


def test_result_of_a_sequence_that_has_left_is_dropped():
    driver = Driver(make_limits(max_inflight=2))
    request = driver.submit("a", PROMPT, GREEDY)
    driver.round()
    before = driver.tokens("a")
    driver.scheduler.finish(request.sequences[0], "abort")
    driver.run()
    assert driver.tokens("a") == before


def test_end_of_text_wastes_at_most_one_step_when_running_ahead():
    tokens = expected_tokens(PROMPT, GREEDY, VOCAB)
    driver = Driver(make_limits(max_inflight=2))
    sampling = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=frozenset({tokens[2]}))
    driver.submit("a", PROMPT, sampling)
    driver.run()
    assert driver.tokens("a") == tokens[:3]
    assert len(driver.runner.plans) <= 3 + 1


def test_length_wastes_no_step_when_running_ahead():
    driver = Driver(make_limits(max_inflight=2))
    driver.submit("a", PROMPT, GREEDY)
    driver.run()
    assert len(driver.runner.plans) == 6


def test_row_error_ends_that_sequence_alone_and_its_blocks_are_not_shared():
    driver = Driver(make_limits())
    driver.runner = FakeRunner(
        make_limits(), row_error=lambda plan, row: "nan" if row.row == 0 else None
    )
    driver.submit("bad", PROMPT, GREEDY)
    driver.submit("good", PROMPT[::-1], GREEDY)
    driver.run()
    assert driver.reasons("bad") == ["error"]
    assert driver.tokens("good") == expected_tokens(PROMPT[::-1], GREEDY, VOCAB)
    driver.runner = FakeRunner(make_limits())
    driver.submit("again", PROMPT, GREEDY)
    driver.run()
    assert driver.cached("again") == 0


def test_failed_step_empties_the_cache_and_all_start_over():
    driver = Driver(make_limits(max_num_batched_tokens=8))
    driver.submit("a", list(range(8)), GREEDY)
    driver.submit("b", list(range(20, 40)), GREEDY)
    step = driver.scheduler.schedule()
    assert step is not None
    assert driver.scheduler.fail([step]) == []
    driver.scheduler.check_integrity()
    assert driver.scheduler.allocator.num_free == 32
    assert not driver.scheduler.running
    driver.run()
    assert driver.tokens("a") == expected_tokens(list(range(8)), GREEDY, VOCAB)
    assert driver.tokens("b") == expected_tokens(list(range(20, 40)), GREEDY, VOCAB)


def test_rows_whose_removal_was_in_a_failed_step_are_removed_again():
    driver = Driver(make_limits(max_num_seqs=2))
    for name in ("a", "b"):
        driver.submit(name, PROMPT[:4], SamplingParams(max_tokens=1))
    driver.round()
    driver.submit("failed", PROMPT, GREEDY)  # takes one of the two rows
    step = driver.scheduler.schedule()
    assert step is not None
    assert sorted(step.plan.removed) == [0, 1]
    driver.scheduler.fail([step])  # broken before the runner saw it
    for name in ("c", "d"):
        driver.submit(name, PROMPT, GREEDY)
    driver.run()
    assert driver.tokens("c") == driver.tokens("d") == expected_tokens(PROMPT, GREEDY, VOCAB)


def test_constrained_sequence_waits_for_its_token_while_others_run_ahead():
    driver = Driver(make_limits(max_inflight=2))
    constraint = Script(num_forced=0)
    driver.submit("free", PROMPT, GREEDY)
    driver.submit("bound", PROMPT[::-1], GREEDY, constraints=(constraint,))
    driver.run()
    assert constraint.num_seen_at_fill == [0, 1, 2, 3, 4, 5]
    assert constraint.accepted == driver.tokens("bound")
    assert driver.tokens("bound") == expected_tokens(PROMPT[::-1], GREEDY, VOCAB)
    assert driver.tokens("free") == expected_tokens(PROMPT, GREEDY, VOCAB)


def test_cached_tokens_are_counted_as_a_request_would_find_them():
    driver = Driver(make_limits())
    prompt = list(range(13))
    assert driver.scheduler.count_cached(tuple(prompt), "") == 0
    driver.submit("a", prompt, GREEDY)
    driver.run()
    for asked in (prompt, prompt[:8], prompt[:9], [*prompt[:6], 60, 61, 62], [9], prompt[:4]):
        counted = driver.scheduler.count_cached(tuple(asked), "")
        driver.submit(str(asked), asked, SamplingParams(temperature=0.0, max_tokens=1))
        driver.run()
        assert counted == driver.cached(str(asked))
    assert driver.scheduler.count_cached(tuple(prompt), "salt") == 0
