"""The in-process engine: the event loop on one side, one worker thread on the other.

Two crossings a step at most: messages go in through one inbox, and each step's outputs come
back by one `call_soon_threadsafe`, however many requests they belong to.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from app.engine.admission import Admission
from app.engine.client import EngineRequest, EngineStats, SequenceOutput
from app.engine.drafts import NgramSpeculation
from app.engine.loop import (
    CountCached,
    Delivery,
    DeviceLost,
    Finish,
    FinishAll,
    Inbox,
    Message,
    StepLoop,
    Stop,
    Submit,
)
from app.engine.measures import EngineMeasures
from app.engine.scheduler import Scheduler
from app.errors import ContextLengthExceeded, Draining, EngineDead
from model.step import Runner, RunnerLimits

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
MAX_RECOVERIES = 3  # of the worker; whoever needs more needs a new process


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Policy knobs of the engine."""

    enable_prefix_caching: bool = True
    speculation: NgramSpeculation | None = None
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # 1 where there is none
    max_num_queued_seqs: int = 1024  # waiting sequences beyond which Overloaded is raised
    max_num_queued_tokens: int = 1 << 20  # the same of prompt tokens of which nothing has come yet


class _Stream:
    """The event loop's end of a request: outputs gather here until somebody asks for them."""

    def __init__(self, request: EngineRequest, send: Callable[[Message], None]) -> None:
        self._request_id = request.request_id
        self._unfinished = set(range(len(request.sampling)))
        self.num_queued_tokens = len(request.prompt_token_ids)  # 0 from the first output on
        self._send = send
        self._outputs: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None  # the reader, if it waits

    @property
    def is_done(self) -> bool:
        return not self._unfinished

    def deliver(self, output: SequenceOutput) -> None:
        if output.finish_reason is not None:
            self._unfinished.discard(output.index)
        self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: str) -> None:
        """End every choice that is left with an error."""
        for index in sorted(self._unfinished):
            self.deliver(SequenceOutput(index=index, finish_reason="error", error=error))

    async def __aiter__(self) -> AsyncIterator[Sequence[SequenceOutput]]:
        loop = asyncio.get_running_loop()
        while self._outputs or self._unfinished:
            if not self._outputs:
                self._waiter = loop.create_future()
                await self._waiter
            outputs, self._outputs = self._outputs, []
            yield outputs

    def finish(self, index: int) -> None:
        if index in self._unfinished:
            self._send(Finish(self._request_id, index, "stop"))

    def abort(self) -> None:
        if self._unfinished:
            self._send(Finish(self._request_id, None, "abort"))


class Engine:
    """EngineClient over a runner in this process. All methods belong to the event loop."""

    def __init__(self, runner: Runner, options: EngineOptions) -> None:
        self._limits = runner.limits
        scheduler = Scheduler(
            runner.limits,
            enable_prefix_caching=options.enable_prefix_caching,
            speculation=options.speculation,
            tenant_weights=options.tenant_weights,
        )
        if options.speculation is not None and runner.limits.max_inflight > 1:
            logger.warning("no speculation: this device works ahead of the tokens it would guess")
        self._admission = Admission(options.max_num_queued_seqs, options.max_num_queued_tokens)
        self._inbox = Inbox()
        self._step_loop = StepLoop(runner, scheduler, self._inbox, self._hand_over)
        self._thread = threading.Thread(target=self._work, name="arriero-engine", daemon=True)
        self._streams: dict[str, _Stream] = {}
        self._questions: set[asyncio.Future[int]] = set()
        self._all_done = asyncio.Event()
        self._num_live_seqs = 0
        self._num_recoveries = 0
        self._is_draining = False
        self._is_dead = False
        self._event_loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the worker thread; outputs will be delivered on the running event loop."""
        self._event_loop = asyncio.get_running_loop()
        self._thread.start()

    async def shutdown(self) -> None:
        """End what is left with an error and stop the thread."""
        self._is_draining = True
        if self._thread.is_alive():
            self._inbox.put(FinishAll("the server is shutting down"))
            self._inbox.put(Stop())
            # A step that hangs holds nobody up: the thread does not outlive the process.
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        self._fail_streams("the server is shutting down")

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_dead

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def heartbeat_age_s(self) -> float:
        return self._step_loop.heartbeat_age_s()

    @property
    def stuck_for(self) -> float:
        return self._step_loop.heartbeat_age_s() / self._step_loop.patience_s

    def give_up(self, error: str) -> None:
        """End every stream with an error now: the worker will not come back."""
        self._is_dead = True
        self._fail_streams(error)

    def submit(self, request: EngineRequest) -> _Stream:
        """Queue a request. Raises ContextLengthExceeded, Overloaded, Draining or EngineDead."""
        self._check(request)
        assert request.request_id not in self._streams
        stream = _Stream(request, self._inbox.put)
        self._admission.enter(stream.num_queued_tokens)
        self._streams[request.request_id] = stream
        self._num_live_seqs += len(request.sampling)
        self._all_done.clear()
        self._inbox.put(Submit(request))
        return stream

    def check_room(self) -> None:
        """Raise Overloaded, Draining or EngineDead if no request would be taken now."""
        self._check_alive()
        self._admission.check_room(self._num_waiting)

    async def count_cached(self, token_ids: Sequence[int], cache_salt: str) -> int:
        """Ask the worker, between two of its steps. Raises EngineDead or Draining."""
        self._check_alive()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._questions.add(answer)
        answer.add_done_callback(self._questions.discard)

        def settle(count: int) -> None:
            if not answer.done():
                answer.set_result(count)

        def on_worker(count: int) -> None:
            self._call_soon(partial(settle, count))

        self._inbox.put(CountCached(tuple(token_ids), cache_salt, on_worker))
        return await answer

    def _check_alive(self) -> None:
        if self._is_dead:
            raise EngineDead("the engine has stopped; the server needs a restart")
        if self._is_draining:
            raise Draining("the server is shutting down")

    def _check(self, request: EngineRequest) -> None:
        self._check_alive()
        limits = self._limits
        max_tokens = max(sampling.max_tokens for sampling in request.sampling)
        num_tokens = len(request.prompt_token_ids) + max_tokens
        capacity = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        if num_tokens > capacity:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {capacity} tokens, but "
                f"{len(request.prompt_token_ids)} in the prompt and {max_tokens} for the "
                "completion were asked for."
            )
        self._admission.check(
            self._num_waiting, len(request.sampling), len(request.prompt_token_ids)
        )

    @property
    def _num_waiting(self) -> int:
        """Sequences without a row, those still in the inbox included."""
        return max(0, self._num_live_seqs - len(self._step_loop.scheduler.running))

    def stats(self) -> EngineStats:
        scheduler = self._step_loop.scheduler
        counters = scheduler.counters
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=self._num_waiting,
            num_blocks=scheduler.allocator.num_blocks,
            num_free_blocks=scheduler.allocator.num_free,
            num_preemptions=counters.num_preemptions,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            num_steps=counters.num_steps,
            num_scheduled_tokens=counters.num_scheduled_tokens,
            num_failed_steps=counters.num_failed_steps,
            num_isolated=counters.num_isolated,
            num_recoveries=self._num_recoveries,
            num_drafts=counters.num_drafts,
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=counters.num_accepted_tokens,
            num_refused_seqs=self._admission.num_refused_seqs,
            num_refused_tokens=self._admission.num_refused_tokens,
        )

    @property
    def measures(self) -> EngineMeasures:
        return self._step_loop.scheduler.counters.measures

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, wait for the running ones, then end the rest with an error."""
        self._is_draining = True
        if not self._streams:
            return
        try:
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        except TimeoutError:
            logger.warning("%d requests did not finish in time", len(self._streams))
            self._inbox.put(FinishAll("the server is shutting down"))

    # From the worker thread to the event loop

    def _work(self) -> None:
        """Run the step loop; should it die, every stream learns of it."""
        try:
            self._run_and_recover()
        except BaseException:  # SystemExit would end the thread without a word
            logger.exception("the engine has died")
            self._is_dead = True
            self._call_soon(partial(self._fail_streams, "the engine has stopped"))

    def _run_and_recover(self) -> None:
        """Run the step loop; a few times, go on with what was running after it has broken."""
        for num_left in reversed(range(MAX_RECOVERIES + 1)):
            try:
                self._step_loop.run()
            except DeviceLost:
                raise
            except Exception:
                if not num_left:
                    raise
                logger.exception("the engine broke; it goes on from the tokens of each request")
                self._step_loop.recover()
                self._num_recoveries += 1
            else:
                return

    def _hand_over(self, deliveries: list[Delivery]) -> None:
        self._call_soon(partial(self._dispatch, deliveries))

    def _call_soon(self, callback: Callable[[], None]) -> None:
        assert self._event_loop is not None
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(callback)

    def _dispatch(self, deliveries: list[Delivery]) -> None:
        for request_id, output in deliveries:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            stream.deliver(output)
            self._admission.leave(stream.num_queued_tokens)
            stream.num_queued_tokens = 0
            if output.finish_reason is not None:
                self._num_live_seqs -= 1
                self._admission.end(self._num_live_seqs)
            if stream.is_done:
                del self._streams[request_id]
        if not self._streams:
            self._all_done.set()

    def _fail_streams(self, error: str) -> None:
        for stream in self._streams.values():
            stream.fail(error)
            self._admission.leave(stream.num_queued_tokens)
        for question in self._questions:
            if not question.done():
                question.set_exception(EngineDead(error))
        self._streams.clear()
        self._num_live_seqs = 0
        self._all_done.set()
