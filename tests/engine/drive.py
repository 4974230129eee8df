"""Drives a scheduler and a fake runner without threads: one call, one round of the step loop."""

from collections import deque
from functools import partial

from app.engine.client import EngineRequest, FinishReason, SequenceOutput
from app.engine.drafts import NgramSpeculation
from app.engine.planning import ScheduledStep, fill_masks
from app.engine.request import Request, Sequence
from app.engine.scheduler import Scheduler, Update
from model.step import ConstraintFailed, RunnerLimits, SamplingParams, StepHandle
from tests.fake_runner import FakeRunner

VOCAB = 64


def make_limits(**overrides: int) -> RunnerLimits:
    values = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 32,
        "vocab_size": VOCAB,
        "max_inflight": 1,
    }
    return RunnerLimits(**{**values, **overrides})


class Driver:
    """Rounds of schedule, launch, collect and update, integrity checked after each."""

    def __init__(
        self,
        limits: RunnerLimits,
        *,
        enable_prefix_caching: bool = True,
        speculation: NgramSpeculation | None = None,
    ) -> None:
        self.runner = FakeRunner(limits)
        self.scheduler = Scheduler(
            limits, enable_prefix_caching=enable_prefix_caching, speculation=speculation
        )
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
        self.ended: set[Sequence] = set()  # by somebody else than the scheduler
        self._inflight: deque[tuple[ScheduledStep, StepHandle]] = deque()

    def submit(
        self, name: str, prompt: list[int], *sampling: SamplingParams, **fields: object
    ) -> Request:
        message = EngineRequest(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=sampling or (SamplingParams(temperature=0.0, max_tokens=4),),
            **fields,
        )
        return self.scheduler.add(message)

    def round(self) -> None:
        limits = self.runner.limits
        while len(self._inflight) < limits.max_inflight:
            step = self.scheduler.schedule()
            self.scheduler.check_integrity()
            if step is None:
                break
            self._inflight.append((step, self.runner.launch(step.plan, partial(fill_masks, step))))
        if self._inflight:
            step, handle = self._inflight.popleft()
            self._keep(self.scheduler.update(step, self.runner.collect(handle)))
        self.scheduler.check_integrity()

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence from outside, as an abort or a stop string does."""
        self.ended.add(sequence)
        self.scheduler.finish(sequence, reason)
        output = SequenceOutput(index=sequence.index, finish_reason=reason)
        self._keep([Update(sequence, output)])
        self.scheduler.check_integrity()

    def fail(self) -> None:
        """Break all steps in flight, with one more if there is something to plan."""
        steps = [step for step, _ in self._inflight]
        if len(steps) < self.runner.limits.max_inflight and (step := self.scheduler.schedule()):
            steps.append(step)
        self._inflight.clear()
        self.runner.abandon()
        updates = self.scheduler.fail(steps)
        self.ended.update(update.sequence for update in updates)
        self._keep(updates)
        self.scheduler.check_integrity()

    def run(self, max_rounds: int = 2000) -> None:
        """Go on until nothing is left to do."""
        for _ in range(max_rounds):
            if not (self.scheduler.running or self.scheduler.waiting or self._inflight):
                return
            self.round()
        raise AssertionError("the scheduler makes no progress")

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return [token_id for output in self.outputs[name, index] for token_id in output.token_ids]

    def reasons(self, name: str, index: int = 0) -> list[str]:
        outputs = self.outputs[name, index]
        return [output.finish_reason for output in outputs if output.finish_reason]

    def cached(self, name: str, index: int = 0) -> int:
        return self.outputs[name, index][-1].num_cached_tokens

    def _keep(self, updates: list[Update]) -> None:
        for update in updates:
            sequence = update.sequence
            key = (sequence.request.request_id, sequence.index)
            self.outputs.setdefault(key, []).append(update.output)


class Script:
    """Forces the next few ids of a list, and notes what it is asked and told."""

    def __init__(self, script=(), *, num_forced=3, ends_at=None, fails_at=None):
        self.script = script
        self.accepted = []
        self.num_seen_at_fill = []
        self._num_forced = num_forced
        self._ends_at = ends_at
        self._fails_at = fails_at

    def fill(self, buffer):
        self.num_seen_at_fill.append(len(self.accepted))
        if self._fails_at is not None and len(self.accepted) >= self._fails_at:
            raise ConstraintFailed("too complex")

    def accept(self, token_ids):
        self.accepted.extend(token_ids)

    def rollback(self, num_tokens):
        del self.accepted[-num_tokens:]

    def num_allowed(self, token_ids):
        return len(token_ids)

    def forced(self):
        place = len(self.accepted)
        return tuple(self.script[place : place + self._num_forced])

    def restarted(self, token_ids):
        again = type(self)(
            self.script,
            num_forced=self._num_forced,
            ends_at=self._ends_at,
            fails_at=self._fails_at,
        )
        again.accept(token_ids)
        return again

    @property
    def is_complete(self):
        return self._ends_at is not None and len(self.accepted) >= self._ends_at
