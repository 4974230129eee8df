"""What answers look like, for the OpenAPI document; tests hold real answers against it.

Answers are built as plain objects, not from these: checking each of a stream's chunks would cost
more than making it.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Part of an answer: it has these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorFields(Part):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Part):
    """Every failure, whatever its status."""

    error: ErrorFields


class PromptTokensDetails(Part):
    """Where the prompt's K/V came from."""

    cached_tokens: int


class UsageAnswer(Part):
    """Tokens taken and given."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenCandidate(Part):
    """A token that might have come, with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenCandidate):
    """A token of the answer, with the most likely ones in its place."""

    top_logprobs: list[TokenCandidate]


class ChatLogprobs(Part):
    """Log-probabilities of a message's content."""

    content: list[ContentLogprob]
    refusal: None = None


class PromptCandidate(Part):
    """A candidate for a place in the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptCandidate] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class AnsweredFunction(Part):
    """The function of a call, or in a stream a piece of it."""

    name: str | None = None
    arguments: str


class AnsweredCall(Part):
    """A call that the model makes; in a stream only the first piece has an id."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: AnsweredFunction


class Message(Part):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class Delta(Part):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(Part):
    """One of the answers to a conversation."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Part):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChunkChoice(Part):
    """One choice's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Part):
    """An event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] | None = None


class TextLogprobs(Part):
    """Log-probabilities in the legacy form."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class TextChoice(Part):
    """One of the completions; in a stream, a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Part):
    """A whole completion, or an event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageAnswer | None = None


class PromptPlan(Part):
    """What one prompt would take."""

    prompt_token_ids: list[int]
    prompt_tokens: int
    expected_cached_tokens: int
    max_tokens: int
    choices: int
    kv_blocks: int


class DryRun(Part):
    """What a request would be, with `?dry_run=1`."""

    object: Literal["dry_run"]
    model: str
    max_model_len: int
    block_size: int
    prompts: list[PromptPlan]


class ModelCard(Part):
    """One name of the served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    precision: str


class ModelList(Part):
    """All names that are served here."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Part):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Part):
    """The text of ids."""

    prompt: str


class Version(Part):
    """The server's version."""

    version: str


class Health(Part):
    """What a probe is told."""

    status: str


class RequestEvent(Part):
    """What happened to a choice; `tokens` are those cached when admitted, or those of a chunk."""

    event: Literal["queued", "admitted", "prefill", "first_token", "preempted", "done"]
    seconds: float = Field(description="From the request's arrival.")
    prompt: int
    choice: int
    tokens: int | None
    reason: Literal["stop", "length", "abort", "error"] | None


class RequestView(Part):
    """A request's events, in order."""

    object: Literal["request"]
    id: str
    created: float
    status: Literal["queued", "running", "parked", "done"]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    events: list[RequestEvent]
    dropped_events: int = Field(description="Chunks and preemptions past the 512th event.")


class EngineView(BaseModel):
    """A snapshot of the engine; counters only grow."""

    model_config = ConfigDict(extra="allow")

    num_requests_running: int = Field(description="Sequences that have blocks.")
    num_requests_waiting: int
