"""Constraints in the scheduler: forced tokens, guesses within a grammar, failures, ends."""

import pytest

from app.engine.drafts import NgramSpeculation
from model.step import SamplingParams
from tests.engine.drive import VOCAB, Driver, Script, make_limits
from tests.fake_runner import expected_tokens

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def run(constraint, sampling=GREEDY, **options):
    driver = Driver(make_limits(**options))
    driver.submit("a", PROMPT, sampling, constraints=(constraint,))
    driver.run()
    return driver


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_forced_tokens_that_are_right_take_fewer_steps(max_inflight):
    expected = expected_tokens(PROMPT, GREEDY, VOCAB)
    constraint = Script(expected)
    driver = run(constraint, max_inflight=max_inflight)
    assert driver.tokens("a") == constraint.accepted == expected
    # The prompt's step, then 4 tokens a step: the token and the 3 behind it that are forced.
    assert len(driver.runner.plans) == 4
    assert driver.scheduler.counters.num_drafts == 0  # what is forced is no guess


def test_forced_tokens_that_the_model_does_not_choose_change_nothing():
    expected = expected_tokens(PROMPT, GREEDY, VOCAB)
    constraint = Script([(token_id + 1) % VOCAB for token_id in expected])
    assert run(constraint).tokens("a") == constraint.accepted == expected


def test_each_draft_has_a_mask_and_the_constraint_is_back_where_it_was():
    constraint = Script(expected_tokens(PROMPT, GREEDY, VOCAB))
    driver = Driver(make_limits())
    driver.submit("a", PROMPT, GREEDY, constraints=(constraint,))
    driver.round()
    assert (len(constraint.num_seen_at_fill), len(constraint.accepted)) == (1, 1)
    driver.round()
    assert driver.runner.plans[-1].num_mask_slots == 4
    assert driver.runner.plans[-1].rows[0].mask_slot == 0
    assert (len(constraint.num_seen_at_fill), len(constraint.accepted)) == (5, 5)


def test_forced_tokens_keep_to_the_length_asked_for():
    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    expected = expected_tokens(PROMPT, sampling, VOCAB)
    driver = run(Script(expected_tokens(PROMPT, GREEDY, VOCAB), num_forced=30), sampling)
    assert driver.tokens("a") == expected
    assert driver.reasons("a") == ["length"]


def test_complete_grammar_ends_the_sequence_without_another_step():
    constraint = Script([], ends_at=5)
    driver = run(constraint)
    assert driver.tokens("a") == expected_tokens(PROMPT, GREEDY, VOCAB)[:5]
    assert driver.reasons("a") == ["stop"]
    assert len(driver.runner.plans) == 5


def test_constraint_that_fails_costs_its_own_sequence_alone():
    driver = Driver(make_limits())
    driver.submit("broken", PROMPT, GREEDY, constraints=(Script([], fails_at=3),))
    driver.submit("bound", PROMPT[::-1], GREEDY, constraints=(Script([]),))
    driver.submit("free", PROMPT[1:], GREEDY)
    driver.run()
    assert driver.reasons("broken") == ["error"]
    assert driver.outputs["broken", 0][-1].error == "too complex"
    assert driver.outputs["broken", 0][-1].is_refused
    assert driver.tokens("broken") == expected_tokens(PROMPT, GREEDY, VOCAB)[:3]
    assert driver.tokens("bound") == expected_tokens(PROMPT[::-1], GREEDY, VOCAB)
    assert driver.tokens("free") == expected_tokens(PROMPT[1:], GREEDY, VOCAB)


def test_guesses_are_made_under_a_constraint_and_counted_as_such():
    sampling = SamplingParams(temperature=0.0, max_tokens=30, seed=1)  # repeats itself
    speculation = NgramSpeculation(
        num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2
    )
    driver = Driver(make_limits(), speculation=speculation)
    constraint = Script([])
    driver.submit("a", PROMPT, sampling, constraints=(constraint,))
    driver.run()
    expected = expected_tokens(PROMPT, sampling, VOCAB)
    assert driver.tokens("a") == constraint.accepted == expected
    assert driver.scheduler.counters.num_draft_tokens > 0


def test_preempted_sequence_keeps_its_place_in_the_grammar():
    limits = make_limits(num_blocks=8, max_num_batched_tokens=16)
    driver = Driver(limits)
    names = [f"s{i}" for i in range(3)]
    constraints = {}
    for place, name in enumerate(names):
        prompt = [place + 1, *PROMPT]
        constraints[name] = Script(expected_tokens(prompt, GREEDY, VOCAB), num_forced=2)
        driver.submit(name, prompt, GREEDY, constraints=(constraints[name],))
    driver.run()
    assert driver.scheduler.counters.num_preemptions > 0
    for place, name in enumerate(names):
        expected = expected_tokens([place + 1, *PROMPT], GREEDY, VOCAB)
        assert driver.tokens(name) == constraints[name].accepted == expected
