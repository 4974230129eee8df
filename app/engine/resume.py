"""A request that may leave the engine and come back: nothing of it is lost, repeated or changed.

While it is away nothing of it is in the engine, only its token log here. It comes back like a
sequence that was preempted: its tokens are known, their K/V is computed again or found in the
prefix cache, and since a sample depends on seed, choice and position alone, the next one is the one
that would have come. Who reads the stream does not notice but by the clock.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from app.engine.client import EngineClient, EngineRequest, Progress, SequenceOutput


@dataclass(slots=True)
class _Log:
    """What came of one choice."""

    token_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    num_cached_tokens: int | None = None  # of the prompt, when it was first computed
    is_over: bool = False


class ResumableStream:
    """RequestStream that can be parked and resumed. It must be read on by somebody meanwhile."""

    def __init__(self, client: EngineClient, request: EngineRequest) -> None:
        self._client = client
        self._request = request
        self._logs = [_Log() for _ in request.sampling]
        self._places = list(range(len(self._logs)))  # of the choices that are in the engine
        self._num_returns = 0
        self._is_leaving = False
        self._is_aborted = False
        self._is_away = asyncio.Event()
        self._is_back = asyncio.Event()
        self._stream = client.submit(request)

    async def __aiter__(self) -> AsyncIterator[Sequence[SequenceOutput]]:
        while True:
            async for outputs in self._stream:
                if taken := [each for output in outputs if (each := self._take(output))]:
                    yield taken
            self._is_back.clear()
            self._is_away.set()
            if self._is_over:
                return
            if not self._is_aborted:
                await self._is_back.wait()
            if self._is_aborted:
                yield self._end_all()
                return

    @property
    def _is_over(self) -> bool:
        return all(log.is_over for log in self._logs)

    def _take(self, output: SequenceOutput) -> SequenceOutput | None:
        """Log an output; return it under the number that its choice has had from the start."""
        place = self._places[output.index]
        log = self._logs[place]
        log.token_ids += output.token_ids
        log.num_prompt_logprobs += len(output.prompt_logprobs)
        if log.num_cached_tokens is None:
            log.num_cached_tokens = output.num_cached_tokens
        if output.finish_reason == "abort" and self._is_leaving and not self._is_aborted:
            return None
        log.is_over |= output.finish_reason is not None
        output.index, output.num_cached_tokens = place, log.num_cached_tokens
        return output

    def _end_all(self) -> list[SequenceOutput]:
        return [
            SequenceOutput(index=index, finish_reason="abort")
            for index, log in enumerate(self._logs)
            if not log.is_over
        ]

    def park(self) -> None:
        """Leave the engine; blocks are free within two steps."""
        if not self._is_leaving:
            self._is_leaving = True
            self._stream.abort()

    async def resume(self) -> None:
        """Come back to the engine. Raises what `submit` raises; then it is parked still."""
        if self._is_leaving:
            await self._is_away.wait()  # all that came of it before is in the log
        if not self._is_leaving or self._is_aborted or self._is_over:
            return  # nothing is left to do, or another call has done it
        self._places = [place for place, log in enumerate(self._logs) if not log.is_over]
        self._num_returns += 1
        self._stream = self._client.submit(self._remainder())
        self._is_leaving = False
        self._is_away.clear()
        self._is_back.set()

    def _remainder(self) -> EngineRequest:
        """Return the request for what has not been generated."""
        request = self._request
        logs = [self._logs[place] for place in self._places]
        constraints = request.constraints and tuple(
            constraint and constraint.restarted(log.token_ids)
            for constraint, log in zip(
                (request.constraints[place] for place in self._places), logs, strict=True
            )
        )
        return replace(
            request,
            request_id=f"{request.request_id}-r{self._num_returns}",
            sampling=tuple(request.sampling[place] for place in self._places),
            constraints=constraints,
            timeline=request.timeline.part(tuple(self._places)),
            progress=tuple(
                Progress(
                    token_ids=tuple(log.token_ids), num_prompt_logprobs=log.num_prompt_logprobs
                )
                for log in logs
            ),
        )

    def finish(self, index: int) -> None:
        log = self._logs[index]
        if self._is_leaving:
            log.is_over = True  # it does not come back
        elif not log.is_over:
            self._stream.finish(self._places.index(index))

    def abort(self) -> None:
        self._is_aborted = True
        self._stream.abort()
        self._is_back.set()
