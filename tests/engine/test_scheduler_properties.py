"""Whatever happens in whatever order: right tokens, one end each, no block lost or shared.

Hypothesis draws pools, budgets and a history of submissions, rounds, aborts and stops. The fake
runner checks every plan, `check_integrity` runs after every round, and the outputs are compared
with what each sequence yields alone.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.engine.drafts import NgramSpeculation
from app.engine.request import Request
from model.step import SamplingParams
from tests.engine.drive import VOCAB, Driver, make_limits
from tests.fake_runner import expected_tokens

# Few ids and two beginnings, so that prefixes meet often.
beginnings = st.sampled_from([[1] * 9, [1] * 4 + [2] * 9])
prompts = st.builds(
    lambda beginning, length, tail: (beginning[:length] + tail) or [3],
    beginnings,
    st.integers(0, 13),
    st.lists(st.integers(0, 3), max_size=6),
)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(0, 12)),
        min_tokens=draw(st.integers(0, 3)),
        stop_token_ids=frozenset(draw(st.lists(st.integers(0, VOCAB - 1), max_size=6))),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
    )


@st.composite
def limits(draw: st.DrawFn):
    num_seqs = draw(st.integers(1, 6))
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    num_tokens = draw(st.integers(32, 96))
    return make_limits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=draw(st.integers(num_seqs, 24)),
        max_model_len=32,
        block_size=block_size,
        num_blocks=-(-num_tokens // block_size),
        max_inflight=draw(st.integers(1, 3)),
    )


submissions = st.tuples(
    st.just("submit"),
    prompts,
    st.lists(samplings(), min_size=1, max_size=3),
    st.integers(-1, 1),
    st.sampled_from(["", "", "salt"]),
)


@st.composite
def speculations(draw) -> NgramSpeculation | None:
    if draw(st.booleans()):
        return None
    longest = draw(st.integers(1, 3))
    return NgramSpeculation(
        num_speculative_tokens=draw(st.integers(1, 6)),
        prompt_lookup_max=longest,
        prompt_lookup_min=draw(st.integers(1, longest)),
    )


rounds = st.tuples(st.just("round"), st.integers(1, 4))
ends = st.tuples(st.just("end"), st.integers(0, 30), st.sampled_from(["abort", "stop"]))
failures = st.tuples(st.just("fail"))
histories = st.lists(st.one_of(submissions, rounds, rounds, ends), max_size=30)
histories_with_failures = st.lists(st.one_of(submissions, rounds, ends, failures), max_size=30)


def replay(driver: Driver, history: list[tuple]) -> list[Request]:
    requests: list[Request] = []
    for event, *details in history:
        if event == "submit":
            prompt, sampling, priority, salt = details
            wants_prompt = any(each.prompt_logprobs is not None for each in sampling)
            requests.append(
                driver.submit(
                    str(len(requests)),
                    prompt,
                    *sampling,
                    priority=priority,
                    tenant=f"t{len(requests) % 3}",
                    cache_salt=salt,
                    read_prefix_cache=not wants_prompt,
                )
            )
        elif event == "round":
            for _ in range(details[0]):
                driver.round()
        elif event == "end":
            place, reason = details
            sequences = [sequence for request in requests for sequence in request.sequences]
            live = [sequence for sequence in sequences if sequence.finish_reason is None]
            if live:
                driver.end(live[place % len(live)], reason)
        else:
            driver.fail()
    driver.run()
    return requests


def check(driver: Driver, requests: list[Request]) -> None:
    for request in requests:
        for sequence in request.sequences:
            name, index = request.request_id, sequence.index
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            expected = expected_tokens(prompt, sequence.sampling, VOCAB)
            tokens = driver.tokens(name, index)
            (reason,) = driver.reasons(name, index)
            assert reason == sequence.finish_reason
            assert tokens == expected[: len(tokens)]
            if sequence not in driver.ended:
                assert tokens == expected
                is_stop = bool(tokens) and tokens[-1] in sequence.sampling.stop_token_ids
                is_stop = is_stop and len(tokens) >= sequence.sampling.min_tokens
                assert reason == ("stop" if is_stop else "length")
                if sequence.sampling.prompt_logprobs is not None:
                    outputs = driver.outputs[name, index]
                    entries = [e.token_id for output in outputs for e in output.prompt_logprobs]
                    assert entries == prompt[1:]
    assert driver.scheduler.allocator.num_free == driver.scheduler.allocator.num_blocks
    assert not driver.scheduler.running
    assert not driver.scheduler.waiting


def run_histories(strategy: st.SearchStrategy, num_examples: int) -> None:
    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(limits(), strategy, st.booleans(), speculations())
    def property_holds(runner_limits, history, enable_prefix_caching, speculation):
        driver = Driver(
            runner_limits, enable_prefix_caching=enable_prefix_caching, speculation=speculation
        )
        check(driver, replay(driver, history))

    property_holds()


def test_any_history_ends_with_the_right_tokens_and_no_block_lost(full):
    run_histories(histories, 5000 if full else 300)


def test_any_history_with_failing_steps_ends_each_sequence_once(full):
    run_histories(histories_with_failures, 2000 if full else 150)
