"""Fair shares: a flood of one tenant moves nobody else's first token."""

import pytest

from app.engine.scheduler import Scheduler
from model.step import SamplingParams
from tests.engine.drive import VOCAB, Driver, make_limits
from tests.fake_runner import expected_tokens


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def prompt_of(number: int, length: int) -> list[int]:
    return [(number * 7 + place * 3) % VOCAB for place in range(length)]


LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_blocks": 200, "max_model_len": 200}


def rounds_to_first_token(driver: Driver, name: str, most: int = 500) -> int:
    for number in range(1, most):
        driver.round()
        if any(output.token_ids for output in driver.outputs.get((name, 0), ())):
            return number
    raise AssertionError("no token came")


def flood(driver: Driver, count: int, *, length: int, tenant: str = "flood") -> None:
    for number in range(count):
        driver.submit(f"f{number}", prompt_of(number, length), params(20), tenant=tenant)


@pytest.mark.parametrize("prompt_length", [1, 10, 60])
@pytest.mark.parametrize("flood_length", [3, 100])
def test_one_request_beside_a_flood_of_200_waits_a_step_more_at_most(prompt_length, flood_length):
    prompt = prompt_of(999, prompt_length)
    alone = Driver(make_limits(**LIMITS))
    alone.submit("one", prompt, params(5), tenant="quiet")
    expected = rounds_to_first_token(alone, "one")
    driver = Driver(make_limits(**LIMITS))
    flood(driver, 200, length=flood_length)
    for _ in range(12):  # all rows are taken
        driver.round()
    driver.submit("one", prompt, params(5), tenant="quiet")
    # The flood's prompts leave it half of each step, so a long prompt takes twice the steps.
    num_chunks = -(-prompt_length // (LIMITS["max_num_batched_tokens"] // 2 - 8))
    assert rounds_to_first_token(driver, "one") <= max(expected, num_chunks) + 1
    driver.run(20_000)
    assert driver.tokens("one") == expected_tokens(prompt, params(5), VOCAB)
    for number in range(200):  # and nobody of the flood lost a token
        prompt = prompt_of(number, flood_length)
        assert driver.tokens(f"f{number}") == expected_tokens(prompt, params(20), VOCAB)


def served(driver: Driver, tenant: str) -> int:
    return sum(
        len(output.token_ids)
        for (name, _), outputs in driver.outputs.items()
        if name.startswith(tenant)
        for output in outputs
    )


def test_tenants_are_served_by_their_weights():
    driver = Driver(make_limits(**LIMITS))
    driver.scheduler = Scheduler(driver.runner.limits, tenant_weights={"heavy": 3.0})
    for number in range(100):
        for tenant in ("heavy", "light"):
            driver.submit(f"{tenant}{number}", prompt_of(number, 4), params(20), tenant=tenant)
    for _ in range(150):
        driver.round()
    assert 2.5 < served(driver, "heavy") / served(driver, "light") < 3.5


def test_tenant_that_was_idle_has_saved_nothing_up():
    driver = Driver(make_limits(**LIMITS))
    driver.submit("early", prompt_of(1, 4), params(2), tenant="b")
    flood(driver, 60, length=4, tenant="a")
    for _ in range(60):
        driver.round()
    for number in range(60):
        driver.submit(f"b{number}", prompt_of(number, 4), params(20), tenant="b")
    before = served(driver, "f")
    for _ in range(60):
        driver.round()
    gained = served(driver, "f") - before
    assert 0.7 < gained / served(driver, "b") < 1.4


def test_one_tenant_alone_is_first_come_first_served():
    driver = Driver(make_limits(max_num_seqs=1))
    for name in "abc":
        driver.submit(name, prompt_of(ord(name), 5), params(3), tenant="t")
    driver.run()
    assert driver.scheduler.counters.num_preemptions == 0
    assert [name for name, _ in driver.outputs] == ["a", "b", "c"]


def test_priority_counts_within_a_tenant_only():
    driver = Driver(make_limits(max_num_seqs=1))
    driver.submit("running", prompt_of(0, 5), params(3), tenant="x")
    driver.round()
    driver.submit("late", prompt_of(1, 5), params(3), tenant="a")
    driver.submit("urgent", prompt_of(2, 5), params(3), tenant="a", priority=-5)
    driver.submit("other", prompt_of(3, 5), params(3), tenant="b", priority=9)
    driver.run()
    order = [name for name, _ in driver.outputs]
    assert order.index("urgent") < order.index("late")
    assert order.index("other") < order.index("late")


def test_tenants_leave_nothing_behind():
    driver = Driver(make_limits(**LIMITS))
    for number in range(50):
        driver.submit(str(number), prompt_of(number, 6), params(3), tenant=f"t{number}")
    driver.run()
    assert not driver.scheduler.shares.is_contended
    assert driver.scheduler.shares._counters == {}
