"""One request's run through the engine: prompts in, deltas of text out, usage counted.

The one path under completions and chat, streamed or not. What lies past a stop string is in no
delta, no count and no metric.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from app.engine.client import EngineRequest, RequestStream, SequenceOutput
from app.engine.resume import ResumableStream
from app.errors import DeadlineExceeded, Draining, EngineFailed, InvalidRequest, ServiceError
from app.protocol.common import SamplingFields
from app.serving.context import ServingContext
from app.serving.metrics import ChoiceTimer
from app.serving.quotas import Quota, Reservation
from app.serving.request_log import RequestRecord
from app.serving.tracing import RequestSpan
from app.text.output import OutputText
from model.step import SamplingParams, TokenConstraint, TokenLogprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt with the parameters of its choices."""

    token_ids: list[int]
    sampling: tuple[SamplingParams, ...]
    constraints: tuple[TokenConstraint, ...] = ()  # none, or one a choice
    shown_token_ids: frozenset[int] = frozenset()  # control tokens that are part of the text


def reserve_tokens(quota: Quota, prompts: Sequence[Prompt]) -> Reservation:
    """Take from a quota what prompts and their choices may use. Raises RateLimited."""
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    most = sum(sampling.max_tokens for prompt in prompts for sampling in prompt.sampling)
    return quota.reserve(num_prompt_tokens, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, under what name, and how long an answer is of use."""

    tenant: str = ""
    request_id: str = ""  # x-request-id
    cache_salt: str = ""  # of the request, under that of its key
    timeout_s: float | None = None
    is_resumable: bool = False
    span: RequestSpan | None = None


@dataclass(slots=True, kw_only=True)
class ChoiceDelta:
    """What came of one choice since its last delta; the last one has a finish_reason."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Usage:
    """Tokens taken and given."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_completion_tokens

    def to_wire(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True)
class _Choice:
    text: OutputText
    timer: ChoiceTimer
    stream: int  # its place among the streams
    num_cached_tokens: int = 0
    reason: str | None = None  # why it has ended


class Generation:
    """Submits the prompts of one request and turns outputs into deltas.

    Choices are numbered prompt * n + choice. `abort` is to be called whatever happens.
    """

    def __init__(
        self,
        context: ServingContext,
        fields: SamplingFields,
        request_id: str,
        prompts: list[Prompt],
        caller: Caller,
    ) -> None:
        self._context = context
        self._caller = caller
        self._is_late = False
        self._failure: ServiceError | None = None
        self._fields = fields
        self._arrival_s = time.monotonic()
        self._first_token_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        drawn = prompts[0].sampling[0]
        if fields.seed is None and not drawn.is_greedy:
            logger.info("request %s: seed %d", request_id, drawn.seed)  # to run it again
        self.usage = Usage(num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
        self._sampling = drawn
        self._choices: list[_Choice] = []
        self._streams: list[tuple[int, RequestStream]] = []
        self._record = RequestRecord(
            request_id=caller.request_id,
            answer_id=request_id,
            tenant=caller.tenant,
            arrival_s=self._arrival_s,
            num_prompt_tokens=self.usage.num_prompt_tokens,
            num_choices=sum(len(prompt.sampling) for prompt in prompts),
        )
        self._span: RequestSpan | None = None
        try:
            for number, prompt in enumerate(prompts):
                self._submit(f"{request_id}-{number}", prompt)
        except BaseException:
            self.abort()
            raise
        context.requests.add(self._record)
        if caller.span is not None:
            self._span = caller.span
            self._span.take()
        if caller.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(caller.timeout_s, self._expire)

    def _submit(self, request_id: str, prompt: Prompt) -> None:
        metrics = self._context.metrics
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt.token_ids),
            sampling=prompt.sampling,
            constraints=prompt.constraints,
            priority=self._fields.priority or 0,
            cache_salt=self._caller.cache_salt,
            tenant=self._caller.tenant,
            read_prefix_cache=self._fields.cache_prompt is not False
            and prompt.sampling[0].prompt_logprobs is None,
        )
        engine = self._context.engine
        stream = (
            ResumableStream(engine, request)
            if self._caller.is_resumable
            else engine.submit(request)
        )
        self._streams.append((len(self._choices), stream))
        self._record.timelines.append(request.timeline)
        max_tokens = prompt.sampling[0].max_tokens
        metrics.count_prompt(len(prompt.token_ids), len(prompt.sampling), max_tokens)
        for choice in range(len(prompt.sampling)):
            text = OutputText(
                self._context.tokenizer,
                stop=self._fields.stop,
                include_stop=bool(self._fields.include_stop_str_in_output),
                skip_special_tokens=self._fields.skip_special_tokens is not False,
                shown_token_ids=prompt.shown_token_ids,
            )
            timer = ChoiceTimer(metrics, self._arrival_s, request.timeline, choice)
            self._choices.append(_Choice(text, timer, len(self._streams) - 1))

    def timing(self) -> dict[str, float]:
        """Return seconds from arrival to the first token, and from there to the last."""
        if self._first_token_s is None:
            return {}
        return {
            "ttft": self._first_token_s - self._arrival_s,
            "decode": time.monotonic() - self._first_token_s,
        }

    def abort(self) -> None:
        """End what has not ended."""
        self._leave_engine()
        cut_off = "abort" if self._failure is None else "error"
        for choice in self._choices:
            choice.timer.end(cut_off)
        if self._span is not None:
            reasons = [choice.reason or cut_off for choice in self._choices]
            self._span.finish(self._record, self._sampling, reasons, self._failure)

    def _leave_engine(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for _, stream in self._streams:
            stream.abort()
        self._record.is_over = True
        self._record.num_cached_tokens = self.usage.num_cached_tokens
        self._record.num_completion_tokens = self.usage.num_completion_tokens

    def park(self) -> None:
        """Leave the engine until `resume`; whoever reads the deltas waits. Needs is_resumable."""
        for _, stream in self._streams:
            assert isinstance(stream, ResumableStream)
            stream.park()

    async def resume(self) -> None:
        """Go on where `park` has ended it. Raises what `submit` raises; then it stays parked."""
        try:
            for _, stream in self._streams:
                assert isinstance(stream, ResumableStream)
                await stream.resume()
        except BaseException:
            self.park()
            raise

    def _expire(self) -> None:
        """End the request, waiting or running: nobody wants its answer any more."""
        self._is_late = True
        self._leave_engine()

    async def deltas(self) -> AsyncIterator[Sequence[ChoiceDelta]]:
        """Yield, at each wake-up, the deltas that have come, until every choice has ended.

        Raises EngineFailed, InvalidRequest, Draining or DeadlineExceeded behind the deltas that
        came before.
        """
        if len(self._streams) == 1:
            first, stream = self._streams[0]
            async for outputs in stream:
                deltas, failure = self._take_all(first, stream, outputs)
                if deltas:
                    yield deltas
                if failure is not None:
                    raise failure
            return
        async for first, stream, outputs in _merged(self._streams):
            deltas, failure = self._take_all(first, stream, outputs)
            if deltas:
                yield deltas
            if failure is not None:
                raise failure

    def _take_all(
        self, first: int, stream: RequestStream, outputs: Sequence[SequenceOutput]
    ) -> tuple[list[ChoiceDelta], ServiceError | None]:
        """Return the deltas of some outputs, and what went wrong behind them."""
        deltas: list[ChoiceDelta] = []
        for output in outputs:
            try:
                delta = self._take(first, stream, output)
            except ServiceError as error:
                self._failure = error
                return deltas, error
            if delta is not None:
                deltas.append(delta)
        return deltas, None

    def _take(
        self, first: int, stream: RequestStream, output: SequenceOutput
    ) -> ChoiceDelta | None:
        choice = self._choices[first + output.index]
        if choice.reason is not None:
            return None
        if output.finish_reason in ("error", "abort"):
            choice.timer.end(output.finish_reason)
            if self._is_late:
                raise DeadlineExceeded(f"The {self._caller.timeout_s:g} s of the request are over.")
            message = output.error or "The request was aborted."
            if output.is_refused:
                raise InvalidRequest(f"The request cannot be served: {message}.")
            # What a shutdown cuts off is worth a retry elsewhere; a broken step is not.
            raise Draining(message) if self._context.engine.is_draining else EngineFailed(message)
        choice.num_cached_tokens = output.num_cached_tokens
        if self._first_token_s is None:
            self._first_token_s = time.monotonic()
        ids = output.token_ids
        is_stopped_by_id = output.stop_token_id is not None
        hides_last = is_stopped_by_id and not self._fields.include_stop_str_in_output
        pushed = choice.text.push(ids[:-1] if hides_last else ids)
        text, stop = pushed.text, pushed.stop
        num_tokens = len(ids) if hides_last and stop is None else pushed.num_tokens
        reason: str | None = output.finish_reason
        if reason is not None and stop is None:
            last = choice.text.finish()
            text, stop = text + last.text, last.stop
        if stop is not None:
            reason = "stop"
            stream.finish(output.index)
        choice.timer.add(num_tokens)
        self.usage.num_completion_tokens += num_tokens
        if reason is not None:
            self._end(choice, output.index, reason)
        if not (text or num_tokens or output.prompt_logprobs or reason):
            return None
        return ChoiceDelta(
            index=first + output.index,
            text=text,
            token_ids=ids[:num_tokens],
            logprobs=output.logprobs[:num_tokens],
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop if stop is not None else self._stop_id(output),
        )

    def finish(self, index: int) -> None:
        """End a choice with what it has said so far; there will be no more deltas of it."""
        choice = self._choices[index]
        if choice.reason is None:
            first, stream = self._streams[choice.stream]
            stream.finish(index - first)
            self._end(choice, index - first, "stop")

    def _end(self, choice: _Choice, index: int, reason: str) -> None:
        choice.reason = reason
        choice.timer.end(reason)
        if index == 0:  # the choices of a prompt share what was cached of it
            self.usage.num_cached_tokens += choice.num_cached_tokens

    def _stop_id(self, output: SequenceOutput) -> int | None:
        """Return a stop id that the user named; an end of text is no reason to tell, as in vLLM."""
        named = self._fields.stop_token_ids or ()
        return output.stop_token_id if output.stop_token_id in named else None


async def _merged(
    streams: Sequence[tuple[int, RequestStream]],
) -> AsyncIterator[tuple[int, RequestStream, Sequence[SequenceOutput]]]:
    """Yield the outputs of several streams as they come."""
    queue: asyncio.Queue[tuple[int, RequestStream, Sequence[SequenceOutput]] | None]
    queue = asyncio.Queue()

    async def forward(first: int, stream: RequestStream) -> None:
        async for outputs in stream:
            queue.put_nowait((first, stream, outputs))
        queue.put_nowait(None)

    tasks = [asyncio.create_task(forward(first, stream)) for first, stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
