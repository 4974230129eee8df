"""A state machine over allocator, prefix cache and scheduler: hypothesis picks each next step.

Where the properties draw a history beforehand, here a step may depend on what has come of those
before: who runs is preempted, whose blocks are free is evicted. After each step rows, blocks and
queues must agree, no more may be held than there is, and what has been said so far must be right.
"""

from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.engine.request import Request, Sequence
from tests.engine.drive import VOCAB, Driver
from tests.engine.test_scheduler_properties import check, limits, prompts, samplings, speculations
from tests.fake_runner import expected_tokens

FULL_STEPS = 10_000
places = st.integers(0, 30)


class SchedulerMachine(RuleBasedStateMachine):
    """All that may happen to a scheduler, and what must hold whatever has happened."""

    num_steps: ClassVar[int] = 0  # of all examples

    @initialize(
        runner_limits=limits(), enable_prefix_caching=st.booleans(), speculation=speculations()
    )
    def start(self, runner_limits, enable_prefix_caching, speculation):
        self.driver = Driver(
            runner_limits, enable_prefix_caching=enable_prefix_caching, speculation=speculation
        )
        self.requests: list[Request] = []

    def live(self) -> list[Sequence]:
        sequences = [sequence for request in self.requests for sequence in request.sequences]
        return [sequence for sequence in sequences if sequence.finish_reason is None]

    @rule(
        prompt=prompts,
        sampling=st.lists(samplings(), min_size=1, max_size=3),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "salt"]),
        tenant=st.sampled_from(["a", "b", "c"]),
    )
    def add(self, prompt, sampling, priority, salt, tenant):
        """Submit a request; further choices are forks of its prompt."""
        wants_prompt = any(each.prompt_logprobs is not None for each in sampling)
        self.requests.append(
            self.driver.submit(
                str(len(self.requests)),
                prompt,
                *sampling,
                priority=priority,
                tenant=tenant,
                cache_salt=salt,
                read_prefix_cache=not wants_prompt,
            )
        )

    @precondition(lambda self: self.requests)
    @rule(place=places, more=samplings())
    def fork(self, place, more):
        """Submit what a request has come to so far: its blocks are shared."""
        sequences = [each for request in self.requests for each in request.sequences]
        sequence = sequences[place % len(sequences)]
        prompt = sequence.token_ids[: self.driver.runner.limits.max_model_len - 12]
        self.add(prompt, [more], sequence.request.priority, sequence.request.cache_salt, "fork")

    @rule()
    def step(self):
        self.driver.round()

    @precondition(lambda self: self.live())
    @rule(place=places)
    def abort(self, place):
        sequences = self.live()
        self.driver.end(sequences[place % len(sequences)], "abort")

    @precondition(lambda self: self.live())
    @rule(place=places)
    def finish(self, place):
        sequences = self.live()
        self.driver.end(sequences[place % len(sequences)], "stop")

    @precondition(lambda self: self.driver.scheduler.running)
    @rule(place=places)
    def preempt(self, place):
        running = self.driver.scheduler.running
        self.driver.scheduler._preempt(running[place % len(running)])

    @precondition(lambda self: self.driver.scheduler.allocator.num_free)
    @rule(count=st.integers(1, 96))
    def evict(self, count):
        """Overwrite the free blocks that were used longest ago."""
        allocator = self.driver.scheduler.allocator
        allocator.release(allocator.allocate(min(count, allocator.num_free)))

    @rule()
    def fail(self):
        self.driver.fail()

    @invariant()
    def rows_blocks_and_queues_agree(self):
        SchedulerMachine.num_steps += 1
        scheduler = self.driver.scheduler
        scheduler.check_integrity()
        held = {block.block_id for sequence in scheduler.running for block in sequence.blocks}
        assert len(held) + scheduler.allocator.num_free == scheduler.allocator.num_blocks
        assert {*scheduler.running, *scheduler.waiting} == set(self.live())

    @invariant()
    def what_was_said_is_right(self):
        for (name, index), outputs in self.driver.outputs.items():
            sequence = self.requests[int(name)].sequences[index]
            said = [token_id for output in outputs for token_id in output.token_ids]
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            assert said == expected_tokens(prompt, sequence.sampling, VOCAB)[: len(said)]

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.run()
            check(self.driver, self.requests)


def test_whatever_is_done_next_rows_blocks_and_tokens_stay_right(full):
    SchedulerMachine.num_steps = 0
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=400 if full else 15,
            stateful_step_count=50 if full else 30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert SchedulerMachine.num_steps >= (FULL_STEPS if full else 100)
