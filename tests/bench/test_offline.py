"""Batches through the step loop in the caller's thread: counts, the steady window, failures."""

import pytest

from app.bench.offline import OfflineEngine, RunFailed, Trace
from tests.engine.drive import make_limits
from tests.fake_runner import FakeRunner

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_blocks": 256, "max_model_len": 128}


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_every_sequence_gets_its_tokens(max_inflight):
    engine = OfflineEngine(FakeRunner(make_limits(**LIMITS, max_inflight=max_inflight)))
    for batch in (1, 8, 3):
        trace = engine.run(batch, 20, 30)
        assert list(trace.num_tokens.values()) == [30] * batch
        assert len(trace.first_s) == len(trace.ended_s) == batch
        assert sum(count for _, count in trace.steps) == 30 * batch


def test_steps_in_which_everybody_decodes_are_told_of():
    engine = OfflineEngine(FakeRunner(make_limits(**LIMITS)))
    told: list[int] = []
    engine.run(4, 20, 30, watch=told.append)
    # The last prompt's first token is one of such a step; with an end the steady state is over.
    assert told == list(range(1, len(told) + 1))
    assert 20 <= len(told) < 30
    engine.run(4, 20, 30)
    assert len(told) < 30


def test_more_sequences_than_rows_take_turns():
    engine = OfflineEngine(FakeRunner(make_limits(**LIMITS)))
    assert sum(engine.run(20, 8, 5).num_tokens.values()) == 100


def test_prompts_are_fresh():
    runner = FakeRunner(make_limits(**LIMITS))
    engine = OfflineEngine(runner)
    seen = [engine._request(64, 1, 0.0, 0).prompt_token_ids for _ in range(20)]
    assert len(set(seen)) == 20


def test_engine_that_fails_says_so():
    class Broken(FakeRunner):
        def collect(self, handle):
            super().collect(handle)
            raise RuntimeError("the card is gone")

    with pytest.raises(Exception, match=r"no step succeeds|gone"):
        OfflineEngine(Broken(make_limits(**LIMITS))).run(2, 8, 4)


def trace(steps: list[tuple[float, int]], first_s: dict, ended_s: dict) -> Trace:
    made = Trace(num_prompt=10, num_output=12, started_s=0.0)
    made.steps, made.first_s, made.ended_s = steps, first_s, ended_s
    made.num_tokens = dict.fromkeys(ended_s, 12)
    return made


def test_window_is_where_everybody_decodes():
    # a begins alone at 1, b joins at 2; a ends at 12, b at 13.
    steps = [(1.0, 1), *((float(at), 2) for at in range(2, 13)), (13.0, 1)]
    made = trace(steps, {"a": 1.0, "b": 2.0}, {"a": 12.0, "b": 13.0})
    window = made.window()
    assert window is not None
    assert (window.num_steps, window.num_tokens, window.seconds) == (10, 20, 10.0)
    assert (window.tokens_per_s, window.median_step_s) == (2.0, 1.0)
    assert window.mean_context == 10 + (3 + 10) / 2
    assert made.output_tokens_per_s == 24 / 13
    assert made.first_delays_s == [1.0, 2.0]


def test_an_interruption_shows_in_the_rate_and_not_in_the_median():
    steps = [(float(at), 1) for at in range(1, 11)] + [(float(at), 1) for at in range(15, 17)]
    window = trace(steps, {"a": 1.0}, {"a": 16.0}).window()
    assert window is not None
    assert window.median_step_s == 1.0
    assert window.tokens_per_s == 11 / 15


def test_no_window_where_some_end_before_others_begin():
    made = trace([(1.0, 1), (2.0, 1)], {"a": 1.0, "b": 9.0}, {"a": 8.0, "b": 16.0})
    assert made.window() is None


def test_wrong_number_of_tokens_is_a_failure(monkeypatch):
    engine = OfflineEngine(FakeRunner(make_limits(**LIMITS)))
    deliver = engine._deliver

    def lose(deliveries):
        deliver(deliveries)
        for request_id in engine._trace.num_tokens:
            engine._trace.num_tokens[request_id] -= 1

    engine._loop._deliver = lose
    with pytest.raises(RunFailed, match="tokens where 4 were asked for"):
        engine.run(2, 8, 4)
