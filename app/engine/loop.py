"""The worker thread: messages in, steps launched and collected, outputs out.

With a runner that works ahead, step N + 1 is launched before step N is collected, so the device
never waits for what the host does with a result. Knows nothing of asyncio: `deliver` carries
outputs away.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from app.engine.client import EngineRequest, FinishReason, SequenceOutput
from app.engine.planning import ScheduledStep, fill_masks
from app.engine.request import Request
from app.engine.scheduler import Scheduler, Update
from model.step import NewRow, PlanRow, Runner, SamplingParams, StepHandle, StepPlan

logger = logging.getLogger(__name__)

Delivery = tuple[str, SequenceOutput]  # request id, output
FIRST_PATIENCE_S = 60.0  # the first step of a large model may be slow
MIN_PATIENCE_S = 10.0
MAX_EMPTY_ROUNDS = 8  # a preemption can leave one round without a plan


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Finish:
    """End choices of a request: one of them, or with index None all that are left.

    `error` is the message of reason "error".
    """

    request_id: str
    index: int | None
    reason: FinishReason
    error: str | None = None


@dataclass(frozen=True, slots=True)
class FinishAll:
    """End every sequence with an error."""

    error: str


@dataclass(frozen=True, slots=True)
class CountCached:
    """A question: how much of a prompt is in the prefix cache. `answer` is called with it."""

    token_ids: tuple[int, ...]
    cache_salt: str
    answer: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the thread."""


Message = Submit | Finish | FinishAll | CountCached | Stop


class Inbox:
    """Messages from any thread to the worker, which sleeps while there is nothing to do."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._has_messages = threading.Condition()

    def put(self, message: Message) -> None:
        with self._has_messages:
            self._messages.append(message)
            self._has_messages.notify()

    def take_all(self, *, wait: bool) -> list[Message]:
        """Return what is there, in order; with `wait`, sleep until that is at least one."""
        with self._has_messages:
            while wait and not self._messages:
                self._has_messages.wait()
            messages = list(self._messages)
            self._messages.clear()
            return messages


@dataclass(frozen=True, slots=True)
class _Inflight:
    step: ScheduledStep
    handle: StepHandle
    launched_s: float


class DeviceLost(Exception):
    """Not even a step of one token succeeds: only a new process can help."""


class StepLoop:
    """Runs steps until it is told to stop. Everything it owns belongs to its thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        inbox: Inbox,
        deliver: Callable[[list[Delivery]], None],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._inbox = inbox
        self._deliver = deliver
        self._messages: deque[Message] = deque()  # taken, not yet handled
        self._requests: dict[str, Request] = {}
        self._inflight: deque[_Inflight] = deque()
        # Halving a full batch down to one sequence, and trying that twice, fails so often.
        self._max_failed_in_a_row = runner.limits.max_num_seqs.bit_length() + 3
        self._num_failed_in_a_row = 0
        self._num_empty_rounds = 0
        self._is_idle = True
        self._last_beat = time.monotonic()
        self._collected_s = 0.0  # when the last step was
        self._longest_round_s: float | None = None

    @property
    def patience_s(self) -> float:
        """How long a round may take before something is wrong: far longer than any has so far."""
        if self._longest_round_s is None:
            return FIRST_PATIENCE_S
        return max(MIN_PATIENCE_S, 5 * self._longest_round_s)

    def heartbeat_age_s(self) -> float:
        """Seconds since the loop last came round; 0 while it sleeps for lack of work."""
        return 0.0 if self._is_idle else time.monotonic() - self._last_beat

    def run(self) -> None:
        """Serve until `Stop`. Raises when steps fail again and again; `recover` may help."""
        while True:
            has_work = bool(self._requests or self._inflight or self._messages)
            self._is_idle = not has_work
            self._messages += self._inbox.take_all(wait=not has_work)
            self._last_beat = time.monotonic()
            self._is_idle = False
            while self._messages:
                message = self._messages.popleft()
                if isinstance(message, Stop):
                    return
                self._send(self._handle(message))
            self._send(self._step())
            self._longest_round_s = max(
                self._longest_round_s or 0.0, time.monotonic() - self._last_beat
            )

    def recover(self) -> None:
        """Put all requests into a new scheduler, from their tokens, after `run` has raised."""
        self._inflight.clear()
        self._num_failed_in_a_row = 0
        self._num_empty_rounds = 0
        self._scheduler = self._scheduler.rebuilt(self._requests.values())

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def _send(self, deliveries: list[Delivery]) -> None:
        if deliveries:
            self._deliver(deliveries)

    # Messages

    def _handle(self, message: Submit | Finish | FinishAll | CountCached) -> list[Delivery]:
        if isinstance(message, CountCached):
            message.answer(self._scheduler.count_cached(message.token_ids, message.cache_salt))
            return []
        if isinstance(message, Submit):
            request = self._scheduler.add(message.request)
            self._requests[request.request_id] = request
            return []
        if isinstance(message, FinishAll):
            ends = [
                Finish(request_id, None, "error", message.error) for request_id in self._requests
            ]
            return [delivery for end in ends for delivery in self._finish(end)]
        return self._finish(message)

    def _finish(self, message: Finish) -> list[Delivery]:
        """End sequences from outside; those that have ended meanwhile are left alone."""
        request = self._requests.get(message.request_id)
        if request is None:
            return []
        updates = []
        for sequence in request.sequences:
            is_meant = message.index is None or sequence.index == message.index
            if is_meant and sequence.finish_reason is None:
                self._scheduler.finish(sequence, message.reason)
                output = SequenceOutput(
                    index=sequence.index,
                    num_cached_tokens=sequence.num_cached_tokens,
                    finish_reason=message.reason,
                    error=message.error,
                )
                updates.append(Update(sequence, output))
        return self._address(updates)

    def _address(self, updates: list[Update]) -> list[Delivery]:
        """Say whose each output is, and forget the requests that are done."""
        deliveries = []
        for update in updates:
            request = update.sequence.request
            deliveries.append((request.request_id, update.output))
            if update.output.finish_reason is None:
                continue
            if all(sequence.finish_reason for sequence in request.sequences):
                self._requests.pop(request.request_id, None)
        return deliveries

    # Steps

    def _step(self) -> list[Delivery]:
        """Launch what can be launched, collect the oldest step in flight."""
        while len(self._inflight) < self._runner.limits.max_inflight:
            step = self._scheduler.schedule()
            if step is None:
                break
            try:
                self._launch(step)
            except Exception:
                return self._fail()
        if not self._inflight:
            self._check_progress()
            return []
        oldest = self._inflight[0]
        try:
            result = self._runner.collect(oldest.handle)
        except Exception:
            return self._fail()
        self._inflight.popleft()
        self._measure(oldest)
        self._num_failed_in_a_row = 0
        self._num_empty_rounds = 0
        return self._address(self._scheduler.update(oldest.step, result))

    def _fail(self) -> list[Delivery]:
        """Give up the steps in flight: one of them broke. Raises DeviceLost if none can succeed."""
        logger.exception("a step failed")
        self._num_failed_in_a_row += 1
        broken = [inflight.step for inflight in self._inflight]
        self._inflight.clear()
        deliveries = self._address(self._scheduler.fail(broken))
        if deliveries or self._num_failed_in_a_row > self._max_failed_in_a_row:
            self._send(deliveries)  # somebody was found guilty, or nobody is in sight
            self._try_device()
            self._num_failed_in_a_row = 0
        return []

    def _try_device(self) -> None:
        """Run a step of one token that is nobody's. Raises DeviceLost if even that fails."""
        self._scheduler.clear_rows()
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        row = NewRow(row=0, token_ids=(0,), num_prompt_tokens=1, sampling=sampling)
        plan = StepPlan(
            step_id=-1,
            removed=tuple(range(self._runner.limits.max_num_seqs)),
            added=(row,),
            rows=(
                PlanRow(
                    row=0, start=0, num_tokens=1, new_block_ids=(0,), logits_from=0, sample=True
                ),
            ),
        )
        try:
            (result,) = self._runner.collect(self._runner.launch(plan, lambda _: None)).rows
        except Exception as error:
            raise DeviceLost("no step succeeds any more") from error
        if result.error is not None:
            raise DeviceLost(result.error)

    def _check_progress(self) -> None:
        """Raise if requests are left but nothing can be planned, rather than spin for ever."""
        self._num_empty_rounds = self._num_empty_rounds + 1 if self._requests else 0
        if self._num_empty_rounds > MAX_EMPTY_ROUNDS:
            raise RuntimeError(f"{len(self._requests)} requests can never be scheduled")

    def _launch(self, step: ScheduledStep) -> None:
        """Hand a step to the runner; a step that breaks here counts as in flight."""

        launched_s = time.monotonic()
        self._inflight.append(_Inflight(step, StepHandle(plan=step.plan), launched_s))
        handle = self._runner.launch(step.plan, partial(fill_masks, step))
        self._inflight[-1] = _Inflight(step, handle, launched_s)

    def _measure(self, inflight: _Inflight) -> None:
        """Count the time of a step whose result has just come."""
        now = time.monotonic()
        seconds = now - max(inflight.launched_s, self._collected_s)
        self._scheduler.counters.measures.step_seconds.observe(seconds)
        self._collected_s = now
