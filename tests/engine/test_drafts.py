"""Guesses by prompt lookup: what is proposed, when it stops, and that it changes no token."""

import random

import pytest

from app.engine.drafts import MAX_PAUSE, Drafter, NgramIndex, NgramSpeculation
from model.step import SamplingParams
from tests.engine.drive import VOCAB, Driver, make_limits
from tests.fake_runner import expected_tokens

SPECULATION = NgramSpeculation(num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
REPEATING = SamplingParams(temperature=0.0, max_tokens=40, seed=1)


def drafter() -> Drafter:
    return Drafter(SPECULATION, capacity=1000)


def test_what_followed_the_same_words_is_proposed():
    assert drafter().propose([1, 2, 3, 4, 5, 6, 7, 1, 2], 4) == (3, 4, 5, 6)


def test_the_longest_match_wins_then_the_latest():
    text = [9, 1, 2, 7, 0, 8, 1, 2, 5, 0, 9, 1, 2]
    assert drafter().propose(text, 1) == (7,)
    assert drafter().propose([*text[:-3], 6, 1, 2], 1) == (5,)


def test_nothing_is_proposed_without_a_match_or_room():
    assert drafter().propose([1, 2, 3, 4], 4) == ()
    assert drafter().propose([1, 2, 1, 2], 0) == ()
    assert drafter().propose([], 4) == ()


def test_text_that_repeats_is_continued_beyond_its_end():
    assert drafter().propose([1, 2, 3, 1, 2, 3], 4) == (1, 2, 3, 1)


def test_wrong_guesses_make_the_pauses_longer_and_a_right_one_ends_them():
    drafts = drafter()
    text = [1, 2, 3, 1, 2]
    waits = []
    for _ in range(6):
        wait = 0
        while not (proposed := drafts.propose(text, 4)):
            wait += 1
        waits.append(wait)
        drafts.learn(len(proposed), 0)
    assert waits == [0, 1, 2, 4, 8, MAX_PAUSE]
    while not (proposed := drafts.propose(text, 4)):
        pass
    assert len(proposed) == 1
    drafts.learn(1, 1)
    assert len(drafts.propose(text, 4)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_index_that_grows_finds_what_a_scan_finds(seed):
    rng = random.Random(seed)
    text: list[int] = []
    index = NgramIndex(2, capacity=60)
    for _ in range(60):
        text.append(rng.randrange(4))
        found = index.find(text, 3)
        matches = []
        for end in range(2, len(text)):
            length = 0
            while length < min(3, end) and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length >= 2:
                matches.append((length, end))
        assert found == (max(matches)[1] if matches else None)


def test_right_guesses_save_steps_and_change_no_token():
    driver = Driver(make_limits(), speculation=SPECULATION)
    driver.submit("a", [1, 2, 3], REPEATING)
    driver.run()
    assert driver.tokens("a") == expected_tokens([1, 2, 3], REPEATING, VOCAB)
    counters = driver.scheduler.counters
    assert counters.num_steps < 40
    assert 0 < counters.num_accepted_tokens <= counters.num_draft_tokens
    assert counters.num_steps + counters.num_accepted_tokens >= 40


def drive_four(num_blocks: int, speculation: NgramSpeculation | None) -> Driver:
    driver = Driver(make_limits(num_blocks=num_blocks), speculation=speculation)
    for name in "abcd":
        driver.submit(name, [1, 2, 3], REPEATING)
    driver.run()
    return driver


@pytest.mark.parametrize("num_blocks", [12, 13, 20, 44])
def test_guesses_end_with_max_tokens_and_preempt_nobody(num_blocks):
    driver = drive_four(num_blocks, SPECULATION)
    for plan in driver.runner.plans:
        assert all(row.start + row.num_tokens <= 3 + 40 for row in plan.rows)
    for name in "abcd":
        assert driver.tokens(name) == expected_tokens([1, 2, 3], REPEATING, VOCAB)
    plain = drive_four(num_blocks, None)
    assert driver.scheduler.counters.num_preemptions <= plain.scheduler.counters.num_preemptions


def test_runner_that_works_ahead_gets_no_guesses():
    driver = Driver(make_limits(max_inflight=2), speculation=SPECULATION)
    driver.submit("a", [1, 2, 3], REPEATING)
    driver.run()
    assert not any(row.draft_token_ids for plan in driver.runner.plans for row in plan.rows)
    assert driver.tokens("a") == expected_tokens([1, 2, 3], REPEATING, VOCAB)


def test_stop_token_among_accepted_guesses_cuts_what_follows():
    stopped = SamplingParams(
        temperature=0.0, max_tokens=40, seed=1, stop_token_ids=frozenset({2}), min_tokens=12
    )
    driver = Driver(make_limits(), speculation=SPECULATION)
    driver.submit("a", [1, 2, 3], stopped)
    driver.run()
    assert driver.tokens("a") == expected_tokens([1, 2, 3], stopped, VOCAB)
    assert driver.reasons("a") == ["stop"]
