"""Quotas of keys: what is refused, what is told, what is given back. Clocks stand still."""

import asyncio

import pytest

from app.errors import RateLimited
from app.serving.quotas import Bucket, Quota, Tenants, format_duration
from app.settings import ApiKey
from tests.api.serve import client_of, run
from tests.fake_engine import FakeEngine, says

BODY = {"prompt": "abc", "max_tokens": 10}  # 4 tokens with <s>


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key_with(**limits) -> ApiKey:
    return ApiKey(name="alice", key="a", **limits)


def headers(key: str = "a") -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def check_refusal(response, kind: str) -> None:
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, "rate_limit_exceeded", None)
    assert "alice" in error["message"]


def test_bucket_fills_evenly_up_to_its_limit():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert (bucket.remaining, bucket.reset_s, bucket.wait_s(1)) == (0, 60.0, 1.0)
    for _ in range(100):
        clock.now += 0.1
    assert bucket.remaining == 10
    clock.now += 3600
    assert (bucket.remaining, bucket.reset_s) == (60, 0.0)


def test_request_is_admitted_exactly_when_it_was_told_to_return():
    clock = Clock()
    quota = Quota(key_with(requests_per_minute=7), clock)
    for _ in range(7):
        quota.enter()
    with pytest.raises(RateLimited) as refused:
        quota.enter()
    clock.now += refused.value.retry_after_s - 0.01
    with pytest.raises(RateLimited):
        quota.enter()
    clock.now += 0.01
    quota.enter()


def test_unused_tokens_are_given_back_once():
    clock = Clock()
    quota = Quota(key_with(tokens_per_minute=100), clock)
    first = quota.reserve(10, 80)
    with pytest.raises(RateLimited):
        quota.reserve(10, 20)
    first.settle(15)
    first.settle(15)
    assert quota.headers()["x-ratelimit-remaining-tokens"] == "85"


def test_request_that_may_need_more_than_a_minute_holds_runs_and_is_paid_for_later():
    clock = Clock()
    quota = Quota(key_with(tokens_per_minute=60), clock)
    quota.reserve(10, 4000).settle(120)
    with pytest.raises(RateLimited) as refused:
        quota.reserve(1, 0)
    assert refused.value.retry_after_s == pytest.approx(61)


def test_prompt_over_the_limit_is_not_worth_a_retry():
    with pytest.raises(RateLimited) as refused:
        Quota(key_with(tokens_per_minute=60), Clock()).reserve(61, 1)
    assert refused.value.retry_after_s is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "18ms"), (1, "1s"), (8.5, "8.5s"), (60, "1m0s"), (72.5, "1m12.5s")],
)
def test_duration_is_written_as_openai_does(seconds, text):
    assert format_duration(seconds) == text


def test_answers_tell_what_is_left_and_the_next_request_is_refused():
    async def scenario():
        engine = FakeEngine(says("hi"))
        key = key_with(requests_per_minute=1, tokens_per_minute=1000)
        async with client_of(engine, named_keys=(key,)) as client:
            good = await client.post("/v1/completions", json=BODY, headers=headers())
            assert good.status_code == 200
            assert good.headers["x-ratelimit-limit-requests"] == "1"
            assert good.headers["x-ratelimit-remaining-requests"] == "0"
            assert good.headers["x-ratelimit-reset-requests"].endswith("s")
            assert good.headers["x-ratelimit-limit-tokens"] == "1000"
            assert int(good.headers["x-ratelimit-remaining-tokens"]) == 986  # 4 + 10 reserved
            bad = await client.post("/v1/completions", content=b"{", headers=headers())
            check_refusal(bad, "requests")  # not even its body was read
            assert 0 < int(bad.headers["retry-after-ms"]) <= 60_000
            assert 0 < int(bad.headers["retry-after"]) <= 60
            assert bad.headers["x-should-retry"] == "true"
            assert bad.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(engine.requests) == 1

    run(scenario())


def test_tokens_left_over_come_back_when_the_answer_ends():
    async def scenario():
        async with client_of(
            FakeEngine(says("hi")), named_keys=(key_with(tokens_per_minute=24),)
        ) as client:
            for stream in (False, True):  # 6 or 7 used of 24
                response = await client.post(
                    "/v1/completions", json={**BODY, "stream": stream}, headers=headers()
                )
                assert response.status_code == 200, response.text
            third = await client.post("/v1/completions", json=BODY, headers=headers())
            check_refusal(third, "tokens")
            long = {"prompt": "x" * 30, "max_tokens": 1}
            never = await client.post("/v1/completions", json=long, headers=headers())
            check_refusal(never, "tokens")
            assert never.headers["x-should-retry"] == "false"
            assert "retry-after" not in never.headers

    run(scenario())


def test_so_many_requests_at_once_and_no_more():
    async def scenario():
        engine = FakeEngine(says("hi"))
        engine.gate.clear()
        keys = (key_with(max_concurrent=1), ApiKey(name="bob", key="b"))
        async with client_of(engine, named_keys=keys) as client:
            first = asyncio.ensure_future(
                client.post("/v1/completions", json=BODY, headers=headers())
            )
            while not engine.requests:
                await asyncio.sleep(0)
            second = await client.post("/v1/completions", json=BODY, headers=headers())
            check_refusal(second, "concurrent_requests")
            engine.gate.set()
            other = await client.post("/v1/completions", json=BODY, headers=headers("b"))
            assert other.status_code == 200
            assert not [name for name in other.headers if name.startswith("x-ratelimit")]
            assert (await first).status_code == 200
            for body in (BODY, {}, BODY):  # a request that fails leaves its place, too
                last = await client.post("/v1/completions", json=body, headers=headers())
                assert last.status_code == (200 if body else 400)

    run(scenario())


def test_salt_of_a_key_cannot_be_spelt_by_another():
    keys = [ApiKey(name=name, key=name, cache_salt=salt) for name, salt in
            (("alice", "s"), ("ann", "s"), ("bob", "t"), ("carol", ""))]  # fmt: skip
    tenants = Tenants(keys)
    own = tenants.cache_salt("alice", None)
    assert own == tenants.cache_salt("ann", None)
    salts = [own, tenants.cache_salt("alice", "x"), tenants.cache_salt("bob", None)]
    salts += [tenants.cache_salt("carol", given) for given in (None, "s", "x")]
    assert len(set(salts)) == len(salts)
    assert Tenants(keys).cache_salt("alice", None) != own  # a secret of the process


def test_salt_of_a_key_reaches_the_engine():
    async def scenario():
        engine = FakeEngine(says("hi"))
        async with client_of(engine, named_keys=(key_with(cache_salt="s"),)) as client:
            for body in (BODY, {**BODY, "cache_salt": "x"}):
                await client.post("/v1/completions", json=body, headers=headers())
            probe = await client.post(
                "/v1/completions?dry_run=1", json={"prompt": "x" * 40}, headers=headers()
            )
            assert b'"expected_cached_tokens":0,' in probe.content
        first, second = (request.cache_salt for request in engine.requests)
        assert first not in ("", "s")
        assert second == first + "x"

    run(scenario())
