"""Answers with an idempotency key: one run of the engine for all requests that repeat a key.

A run is driven by a task of its own and keeps what it has said, so that whoever joins gets all of
it from the beginning, or from behind the last event that it has. When the last one goes, the run
leaves the engine, which frees its blocks, and waits for somebody to come back for so long; what has
ended well is kept in a bounded store. What has failed is forgotten: a retry is meant to try again.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from app.errors import Draining, IdempotencyConflict, Overloaded, ResumeExpired, ServiceError
from app.serving.answer import JsonObject, ResumableAnswer, encode_json

logger = logging.getLogger(__name__)

MAX_RUNS = 1024
MAX_BYTES = 64 << 20  # of all that was said
MAX_AGE_S = 600.0  # since the end
MAX_AT_ONCE = 256  # events handed to a reader that is behind
RunKey = tuple[str, str]  # tenant, idempotency key


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What is run for a key. `digest` stands for the whole request, its path included."""

    digest: bytes
    is_stream: bool
    begin: Callable[[], Awaitable[ResumableAnswer]]
    settle: Callable[[int], None]  # called once, with the tokens used, after `begin` was


class Run:
    """One answer under way or done, and those who follow it. Used on the event loop only."""

    def __init__(
        self, request: RunRequest, window_s: float, on_end: Callable[["Run"], None]
    ) -> None:
        self.run_id = uuid.uuid4().hex[:12]
        self.digest = request.digest
        self.num_bytes = 0
        self.is_done = False
        self.error: ServiceError | None = None
        self._window_s = window_s
        self._on_end = on_end
        self._events: list[bytes] = []
        self._body: JsonObject = {}
        self._answer: ResumableAnswer | None = None
        self._num_followers = 0
        self._is_parked = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: set[asyncio.Future[None]] = set()  # followers who have read all there is
        self._task = asyncio.create_task(self._drive(request))

    @property
    def is_followed(self) -> bool:
        return self._num_followers > 0

    @property
    def num_events(self) -> int:
        return len(self._events)

    async def join(self) -> None:
        """Become a follower; `leave` follows. Raises ServerError if it cannot go on now."""
        self._num_followers += 1
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_parked or self.is_done:
            return
        try:
            await self._resume()
        except BaseException:
            self.leave()
            raise

    async def _resume(self) -> None:
        if self._answer is not None:
            resuming = asyncio.ensure_future(self._answer.resume())
            try:
                # A run that ends meanwhile will not come back.
                await asyncio.wait({resuming, self._task}, return_when=asyncio.FIRST_COMPLETED)
                if resuming.done():
                    resuming.result()
            finally:
                resuming.cancel()
        self._is_parked = False

    def leave(self) -> None:
        """Follow no more. The last one to go leaves it parked, unless it has ended."""
        self._num_followers -= 1
        if self._num_followers or self.is_done:
            return
        self._is_parked = True
        if self._answer is not None:
            self._answer.park()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._window_s, self.end)

    def end(self) -> None:
        """Give it up."""
        self._task.cancel()

    async def wait_ended(self) -> None:
        await asyncio.wait({self._task})

    async def events(self, first: int) -> AsyncIterator[Sequence[bytes]]:
        """Yield events from a number on, those that have been at once. Raises its error."""
        while True:
            if events := self._events[first : first + MAX_AT_ONCE]:
                first += len(events)
                yield events
            elif self.is_done:
                break
            else:
                await self._change()
        if self.error is not None:
            raise self.error

    async def body(self) -> JsonObject:
        """Return the whole answer. Raises its error."""
        while not self.is_done:
            await self._change()
        if self.error is not None:
            raise self.error
        return self._body

    def timing(self) -> dict[str, float]:
        return self._answer.timing() if self._answer is not None else {}

    def num_tokens(self) -> int:
        return self._answer.num_tokens() if self._answer is not None else 0

    async def _drive(self, request: RunRequest) -> None:
        """Run to the end, whoever follows; note what is said."""
        try:
            answer = self._answer = await request.begin()
            if self._is_parked:
                answer.park()
            if request.is_stream:
                async for events in answer.events():
                    self._events += events
                    self.num_bytes += sum(map(len, events))
                    self._tell()
            else:
                self._body = await answer.body()
                self.num_bytes = len(encode_json(self._body))
        except ServiceError as error:
            self.error = error
        except asyncio.CancelledError:
            self.error = Draining("the server is shutting down")
        except Exception:  # those who follow must be told
            logger.exception("run %s failed", self.run_id)
            self.error = ServiceError("The server had an internal error.")
        finally:
            self.is_done = True
            if self._answer is not None:
                self._answer.abort()
            request.settle(self.num_tokens())
            if self._timer is not None:
                self._timer.cancel()
            self._on_end(self)
            self._tell()

    async def _change(self) -> None:
        """Wait until something has been said, or all is over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _tell(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class FollowedAnswer:
    """Answer that one request takes from a run, from event `first` on."""

    def __init__(self, run: Run, first: int, *, is_replayed: bool) -> None:
        self._run = run
        self._has_left = False
        self.run_id = run.run_id
        self.first = first
        self.is_replayed = is_replayed

    def events(self) -> AsyncIterator[Sequence[bytes]]:
        return self._run.events(self.first)

    async def body(self) -> JsonObject:
        return await self._run.body()

    def abort(self) -> None:
        if not self._has_left:
            self._has_left = True
            self._run.leave()

    def timing(self) -> dict[str, float]:
        return self._run.timing()

    def num_tokens(self) -> int:
        return self._run.num_tokens()


class RunStore:
    """The runs by key, bounded by count, bytes and age. Used on the event loop only."""

    def __init__(
        self,
        window_s: float,
        *,
        max_runs: int = MAX_RUNS,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._max_runs = max_runs
        self._max_bytes = max_bytes
        self._clock = clock
        self._runs: dict[RunKey, Run] = {}  # in order of their start
        self._ended_s: dict[Run, float] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, key: RunKey) -> bool:
        return key in self._runs

    async def follow(
        self, key: RunKey, request: RunRequest, last_event_id: str | None
    ) -> FollowedAnswer:
        """Join the run of a key, or begin it. Raises ClientError or ServerError."""
        self._forget_old()
        run = self._runs.get(key)
        if run is not None and run.digest != request.digest:
            raise IdempotencyConflict(
                "The 'Idempotency-Key' was used before, for a request with another body.",
                param="idempotency-key",
            )
        first = 0 if last_event_id is None else _next_number(run, last_event_id)
        is_replayed = run is not None
        if run is None:
            self._make_room()
            run = self._runs[key] = Run(request, self._window_s, self._on_end)
        await run.join()
        return FollowedAnswer(run, first, is_replayed=is_replayed)

    async def close(self) -> None:
        """End all that has not ended."""
        runs = [run for run in self._runs.values() if not run.is_done]
        for run in runs:
            run.end()
        for run in runs:
            await run.wait_ended()

    def _on_end(self, run: Run) -> None:
        self._ended_s[run] = self._clock()
        if run.error is not None:
            self._forget(run)
        self._shrink(self._max_runs)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - MAX_AGE_S
        for run in [run for run, ended_s in self._ended_s.items() if ended_s <= oldest_s]:
            self._forget(run)

    def _make_room(self) -> None:
        """Let go of answers until one more may begin. Raises Overloaded if all are under way."""
        self._shrink(self._max_runs - 1)
        if len(self._runs) >= self._max_runs:
            raise Overloaded("Too many requests with an Idempotency-Key are under way.")

    def _shrink(self, max_runs: int) -> None:
        """Forget what ended first, then what was parked first, until the rest fits."""
        num_bytes = sum(run.num_bytes for run in self._runs.values())
        parked = [run for run in self._runs.values() if not run.is_done and not run.is_followed]
        for run in [*self._ended_s, *parked]:
            if len(self._runs) <= max_runs and num_bytes <= self._max_bytes:
                return
            num_bytes -= run.num_bytes
            run.end()
            self._forget(run)

    def _forget(self, run: Run) -> None:
        self._ended_s.pop(run, None)
        for key in [key for key, value in self._runs.items() if value is run]:
            del self._runs[key]


def _next_number(run: Run | None, last_event_id: str) -> int:
    """Return the number of the event after one. Raises ResumeExpired."""
    run_id, _, number = last_event_id.partition("-")
    is_number = number.isascii() and number.isdigit() and len(number) <= 9
    if run is None or run_id != run.run_id or not is_number or int(number) >= run.num_events:
        raise ResumeExpired(
            "There is no stream that could go on behind this event: send the request again, "
            "without it.",
            param="last-event-id",
        )
    return int(number) + 1
