"""What the rest of the service sees of the engine: messages and one protocol.

The in-process engine (`engine.py`) implements it; so could a client of an engine in another
process. Nothing here knows how a request is scheduled.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from app.engine.measures import EngineMeasures
from app.engine.timeline import Timeline
from model.step import RunnerLimits, SamplingParams, TokenConstraint, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a choice had come when its request left the engine."""

    token_ids: tuple[int, ...] = ()  # generated
    num_prompt_logprobs: int = 0  # positions of the prompt that were reported


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt and the choices wanted from it; each choice becomes a sequence."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]  # one a choice
    constraints: tuple[TokenConstraint | None, ...] = ()  # empty, or one a choice
    priority: int = 0  # lower runs earlier, as in vLLM
    cache_salt: str = ""
    tenant: str = ""  # whose share of the engine this is
    read_prefix_cache: bool = True
    progress: tuple[Progress, ...] = ()  # empty, or one a choice that goes on
    timeline: Timeline = field(default_factory=Timeline)  # the engine writes it


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """What happened to one choice since the last output; the last one has a finish_reason.

    `logprobs` is parallel to `token_ids` when the choice asked for them, else empty.
    `prompt_logprobs` continues where the previous output's left off. `num_cached_tokens` is
    the number of prompt tokens whose K/V came from the prefix cache.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # with "stop": the id that ended it (last of token_ids)
    error: str | None = None  # with "error": a message fit for the client
    is_refused: bool = False  # with "error": what was asked for is at fault, not the server


class RequestStream(Protocol):
    """The outputs of one request. Used on the event loop only.

    Iterating yields, at each wake-up, all outputs since the last one (several steps may have
    merged), and ends after every choice has had its terminal output: exactly one a choice.
    Leaving early without `abort` leaks nothing but time; callers abort in a `finally`.
    """

    def __aiter__(self) -> AsyncIterator[Sequence[SequenceOutput]]: ...

    def finish(self, index: int) -> None:
        """End one choice now, because its text reached a stop string; idempotent.

        Its terminal output comes with finish_reason "stop"; tokens in it are past the cut.
        """
        ...

    def abort(self) -> None:
        """End all choices that have not ended; their blocks are free within two steps."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine; counters only grow."""

    num_requests_running: int = 0  # sequences with blocks
    num_requests_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # cached blocks nobody uses count as free
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_failed_steps: int = 0
    num_isolated: int = 0  # sequences that ended for a step or a row that went wrong
    num_recoveries: int = 0  # times that the worker broke and went on
    num_drafts: int = 0  # times that a sequence guessed ahead
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # draft tokens that were right
    num_refused_seqs: int = 0  # requests turned away: too many sequences waited
    num_refused_tokens: int = 0  # the same, too many prompt tokens


class EngineClient(Protocol):
    """Submit requests, watch over the engine. Used on the event loop only."""

    @property
    def limits(self) -> RunnerLimits: ...

    def submit(self, request: EngineRequest) -> RequestStream:
        """Queue a request. Raises ContextLengthExceeded, Overloaded, Draining or EngineDead."""
        ...

    def check_room(self) -> None:
        """Raise Overloaded, Draining or EngineDead if no request would be taken now."""
        ...

    async def count_cached(self, token_ids: Sequence[int], cache_salt: str) -> int:
        """Return how many tokens of a prompt the prefix cache holds just now."""
        ...

    def stats(self) -> EngineStats: ...

    @property
    def measures(self) -> EngineMeasures:
        """What is counted by size; it goes on counting."""
        ...

    def heartbeat_age_s(self) -> float:
        """Seconds since the step loop last showed that it is alive; about 0 when idle."""
        ...

    @property
    def is_alive(self) -> bool:
        """False once the worker has died; it does not come back."""
        ...

    @property
    def stuck_for(self) -> float:
        """How far the step under way is over its time: above 1 it is stuck. 0 when idle."""
        ...

    def give_up(self, error: str) -> None:
        """End every stream with an error now, whatever the worker does, and take no more."""
        ...

    @property
    def is_draining(self) -> bool:
        """True once no more requests are taken."""
        ...

    def start(self) -> None:
        """Begin to work; outputs are delivered on the event loop that runs now."""
        ...

    async def shutdown(self) -> None:
        """End what is left with an error and stop working."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, wait for the running ones, then end the rest with an error."""
        ...
