"""The engine's own view of a request: its sequences, and how far each has come.

Mutable, and mutated by the worker thread alone.
"""

from dataclasses import dataclass, field

from app.engine.blocks import Block, Key
from app.engine.client import EngineRequest, FinishReason, Progress
from app.engine.drafts import Drafter
from app.engine.timeline import Timeline
from model.step import SamplingParams, TokenConstraint


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request.

    ::

        | prompt ............ | generated, known | in flight |
        0         num_prompt_tokens       len(token_ids)   num_tokens
        | K/V written or being written |  <- num_computed_tokens

    A token is *in flight* from the launch of the step that samples it until that step is
    collected. `epoch` grows whenever the sequence leaves its row, so that results of steps
    launched before can be told from those that count.
    """

    request: "Request"
    index: int
    sampling: SamplingParams
    constraint: TokenConstraint | None
    token_ids: list[int]
    num_prompt_tokens: int
    block_keys: list[Key] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    num_sent_blocks: int = 0  # that the runner knows of
    num_registered_blocks: int = 0
    num_computed_tokens: int = 0
    num_inflight_tokens: int = 0
    num_cached_tokens: int = 0
    num_prompt_logprobs: int = 0  # positions of the prompt already reported
    num_preemptions: int = 0
    is_suspect: bool = False  # was in a step that failed, and in none that succeeded since
    num_failed_alone: int = 0
    drafter: Drafter | None = None  # from its first guess on
    num_guessed: int = 0  # drafts in flight that are the drafter's
    row: int | None = None
    epoch: int = 0
    finish_reason: FinishReason | None = None

    def leave_row(self) -> None:
        """Keep nothing but the tokens: they are computed again, less what is still cached."""
        self.row = None
        self.epoch += 1
        self.blocks = []
        self.num_sent_blocks = 0
        self.num_registered_blocks = 0
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0
        self.num_guessed = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_inflight_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: the more urgent, then the earlier, then the lower choice."""
        return (self.request.priority, self.request.arrival, self.index)

    @property
    def num_behind(self) -> int:
        """Tokens that the next step can compute: known or in flight, but not computed.

        0 when the last token that it may have is in flight, and when its constraint must see
        the token in flight before another can be sampled.
        """
        # Asked several times a step of every sequence, so it asks no other property.
        num_inflight, max_tokens = self.num_inflight_tokens, self.sampling.max_tokens
        num_tokens = len(self.token_ids) + num_inflight
        if max_tokens and num_tokens - self.num_prompt_tokens >= max_tokens:
            return 0
        if self.constraint is not None and num_inflight:
            return 0
        return num_tokens - self.num_computed_tokens


@dataclass(slots=True, eq=False)
class Request:
    """A prompt with its choices. `arrival` counts submissions."""

    request_id: str
    arrival: int
    priority: int
    root_key: Key
    cache_salt: str
    tenant: str
    read_prefix_cache: bool
    timeline: Timeline
    sequences: list[Sequence] = field(default_factory=list)


def make_request(message: EngineRequest, arrival: int, root_key: Key) -> Request:
    """Turn a submitted message into sequences that wait."""
    request = Request(
        request_id=message.request_id,
        arrival=arrival,
        priority=message.priority,
        root_key=root_key,
        cache_salt=message.cache_salt,
        tenant=message.tenant,
        read_prefix_cache=message.read_prefix_cache,
        timeline=message.timeline,
    )
    constraints = message.constraints or (None,) * len(message.sampling)
    progress = message.progress or (Progress(),) * len(message.sampling)
    choices = zip(message.sampling, constraints, progress, strict=True)
    for index, (sampling, constraint, before) in enumerate(choices):
        request.sequences.append(
            Sequence(
                request=request,
                index=index,
                sampling=sampling,
                constraint=constraint,
                token_ids=[*message.prompt_token_ids, *before.token_ids],
                num_prompt_tokens=len(message.prompt_token_ids),
                num_prompt_logprobs=before.num_prompt_logprobs,
            )
        )
    return request
