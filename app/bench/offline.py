"""Batches through the engine without HTTP: the step loop, its scheduler and a runner, no text.

The loop runs in the thread that asks, and its deliveries, one a step, are what is timed: an
instant is that at which the host has a step's tokens.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from app.engine.client import EngineRequest
from app.engine.loop import Delivery, FinishAll, Inbox, StepLoop, Stop, Submit
from app.engine.scheduler import Scheduler
from model.step import Runner, SamplingParams

SHORTEST_WINDOW = 8  # steps, below which a rate would say little


class RunFailed(Exception):
    """A batch did not give what was asked of it; says why in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The steps in which every sequence decodes: from the last first token to the first end."""

    seconds: float
    num_tokens: int
    num_steps: int
    median_step_s: float
    mean_context: float  # tokens a sequence has, on average over the window

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(slots=True, kw_only=True)
class Trace:
    """What came out of a batch, and when; instants are seconds of the monotonic clock."""

    num_prompt: int
    num_output: int
    started_s: float
    steps: list[tuple[float, int]] = field(default_factory=list)  # instant, tokens given out
    first_s: dict[str, float] = field(default_factory=dict)  # of each sequence's first token
    ended_s: dict[str, float] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def first_delays_s(self) -> list[float]:
        """Times to first token, all prompts having come at once."""
        return sorted(instant - self.started_s for instant in self.first_s.values())

    @property
    def seconds(self) -> float:
        return max(self.ended_s.values()) - self.started_s

    @property
    def output_tokens_per_s(self) -> float:
        """Of everything, prefill included."""
        return sum(self.num_tokens.values()) / self.seconds

    def window(self) -> Window | None:
        """Return the steady state, None where the batch has too little of it."""
        begin_s, end_s = max(self.first_s.values()), min(self.ended_s.values())
        before = sum(count for instant, count in self.steps if instant <= begin_s)
        inside = [(instant, count) for instant, count in self.steps if begin_s < instant <= end_s]
        if len(inside) < SHORTEST_WINDOW:
            return None
        instants = [begin_s, *(instant for instant, _ in inside)]
        num_tokens = sum(count for _, count in inside)
        mean_output = (before + num_tokens / 2) / len(self.first_s)
        return Window(
            seconds=end_s - begin_s,
            num_tokens=num_tokens,
            num_steps=len(inside),
            median_step_s=statistics.median(
                later - earlier for earlier, later in pairwise(instants)
            ),
            mean_context=self.num_prompt + mean_output,
        )


class OfflineEngine:
    """Runs one batch after the other on a runner, in the caller's thread."""

    def __init__(self, runner: Runner, *, seed: int = 0) -> None:
        self.limits = runner.limits
        self._rng = random.Random(seed)
        self._inbox = Inbox()
        self._loop = StepLoop(runner, Scheduler(runner.limits), self._inbox, self._deliver)
        self._num_requests = 0
        self._trace: Trace | None = None
        self._expected = 0
        self._watch: Callable[[int], None] | None = None
        self._num_steady = 0

    def run(
        self,
        batch: int,
        num_prompt: int,
        num_output: int,
        *,
        temperature: float = 0.0,
        watch: Callable[[int], None] | None = None,
    ) -> Trace:
        """Submit prompts of fresh random ids, all at once, and run them to their ends.

        `watch` is told of each step in which everybody decodes, counted from 1. Raises RunFailed
        when a sequence fails or has another number of tokens than asked for.
        """
        requests = [
            self._request(num_prompt, num_output, temperature, index) for index in range(batch)
        ]
        self._expected, self._watch, self._num_steady = batch, watch, 0
        trace = Trace(num_prompt=num_prompt, num_output=num_output, started_s=time.monotonic())
        self._trace = trace
        for request in requests:
            self._inbox.put(Submit(request))
        self._loop.run()
        if trace.error is not None:
            raise RunFailed(trace.error)
        wrong = {count for count in trace.num_tokens.values() if count != num_output}
        if wrong:
            raise RunFailed(f"{wrong} tokens where {num_output} were asked for")
        return trace

    def _request(
        self, num_prompt: int, num_output: int, temperature: float, index: int
    ) -> EngineRequest:
        self._num_requests += 1
        ids = self._rng.choices(range(self.limits.vocab_size), k=num_prompt)
        sampling = SamplingParams(temperature=temperature, seed=index, max_tokens=num_output)
        return EngineRequest(
            request_id=str(self._num_requests), prompt_token_ids=tuple(ids), sampling=(sampling,)
        )

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """Note a step's tokens; once everybody is done, let the loop come back."""
        now_s, trace = time.monotonic(), self._trace
        assert trace is not None
        num_new = 0
        for request_id, output in deliveries:
            count = len(output.token_ids)
            if count:
                num_new += count
                if request_id in trace.num_tokens:
                    trace.num_tokens[request_id] += count
                else:
                    trace.num_tokens[request_id] = count
                    trace.first_s[request_id] = now_s
            if output.finish_reason is not None:
                trace.ended_s[request_id] = now_s
            if output.finish_reason == "error" and trace.error is None:
                trace.error = output.error or "a sequence failed"
                self._inbox.put(FinishAll(trace.error))
        trace.steps.append((now_s, num_new))
        if self._watch is not None and len(trace.first_s) == self._expected and not trace.ended_s:
            self._num_steady += 1
            self._watch(self._num_steady)
        if len(trace.ended_s) == self._expected:
            self._inbox.put(Stop())
