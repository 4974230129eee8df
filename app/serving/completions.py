"""POST /v1/completions: prompts in any of four shapes, echo, legacy log-probabilities."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.protocol.completions import CompletionRequest
from app.protocol.completions import Prompt as WirePrompt
from app.serving.answer import JsonObject, usage_options
from app.serving.context import ServingContext
from app.serving.generation import ChoiceDelta, Generation, Prompt
from app.serving.logprobs import LegacyLogprobs
from app.serving.params import check_ids, check_length, sampling_params, tokenize_text
from app.serving.structured import compile_demand, demand_of
from app.text.detokenize import IncrementalDetokenizer
from model.step import TokenLogprobs

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 1024  # more would never fit the engine's queue, however often they are sent


@dataclass(slots=True)
class _EchoedPrompt:
    """What a choice repeats of its prompt before its own text."""

    text: str
    token_ids: list[int]


async def start_completion(
    context: ServingContext, request: CompletionRequest, request_id: str
) -> "CompletionAnswer":
    """Tokenise and submit. Raises ClientError before anything runs, ServerError if it cannot."""
    context.check_model(request.model)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if not max_tokens and not request.echo:
        raise InvalidRequest("'max_tokens' may be 0 only with 'echo'.", param="max_tokens")
    if len(request.prompt) * (request.n or 1) > MAX_CHOICES:
        raise InvalidRequest(
            f"'prompt' times 'n' may make at most {MAX_CHOICES} choices.", param="n"
        )
    wants_prompt = bool(request.echo) and request.logprobs is not None
    sampling = sampling_params(
        context,
        request,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if wants_prompt else None,
    )
    demand = demand_of(request)
    prompts = []
    for wire_prompt in request.prompt:
        token_ids = await _token_ids(context, request, wire_prompt)
        check_length(context, len(token_ids), max_tokens)
        constraints = await compile_demand(context, demand, len(sampling))
        prompts.append(Prompt(token_ids=token_ids, sampling=sampling, constraints=constraints))
        await asyncio.sleep(0)  # a thousand short prompts are long together: others get a turn
    echoes = [
        _EchoedPrompt(_text(context, wire_prompt), prompt.token_ids)
        for wire_prompt, prompt in zip(request.prompt, prompts, strict=True)
    ]
    generation = Generation(context, request, request_id, prompts)
    return CompletionAnswer(context, request, request_id, generation, echoes)


async def _token_ids(
    context: ServingContext, request: CompletionRequest, prompt: WirePrompt
) -> list[int]:
    if isinstance(prompt, list):
        return check_ids(context, prompt, "prompt")
    if not prompt:
        raise InvalidRequest("'prompt' is empty.", param="prompt")
    token_ids = await tokenize_text(
        context,
        prompt,
        param="prompt",
        add_special_tokens=request.add_special_tokens is not False,
        parse_special=request.parse_special is not False,
    )
    if not token_ids:
        raise InvalidRequest("'prompt' is empty.", param="prompt")
    return token_ids


def _text(context: ServingContext, prompt: WirePrompt) -> str:
    if isinstance(prompt, str):
        return prompt
    detokenizer = IncrementalDetokenizer(context.tokenizer, skip_special_tokens=False)
    return detokenizer.push(prompt) + detokenizer.flush()


@dataclass(slots=True)
class _FoldedChoice:
    """A choice as its deltas add up."""

    text: str = ""
    entries: list[TokenLogprobs | int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class CompletionAnswer:
    """Answer over the deltas of a generation."""

    def __init__(
        self,
        context: ServingContext,
        request: CompletionRequest,
        request_id: str,
        generation: Generation,
        echoes: list[_EchoedPrompt],
    ) -> None:
        self._context = context
        self._request = request
        self._generation = generation
        self._echoes = echoes
        self._n = request.n or 1
        self._num_choices = len(echoes) * self._n
        self._legacy = [
            LegacyLogprobs(context.tokenizer, request.logprobs or 0)
            for _ in range(self._num_choices)
        ]
        self._started: set[int] = set()
        self._head: JsonObject = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model_names[0],
            "system_fingerprint": context.system_fingerprint,
        }

    def abort(self) -> None:
        self._generation.abort()

    async def events(self) -> AsyncIterator[JsonObject]:
        """Yield a chunk a delta, then usage if asked for."""
        usage = usage_options(self._request)
        async for delta in self._generation.deltas():
            text, entries = self._with_echo(delta)
            choice: JsonObject = {
                "index": delta.index,
                "text": text,
                "logprobs": self._logprobs(delta.index, entries),
                "finish_reason": delta.finish_reason,
            }
            if delta.stop_reason is not None:
                choice["stop_reason"] = delta.stop_reason
            chunk = {**self._head, "choices": [choice]}
            if usage.in_each:
                chunk["usage"] = self._generation.usage.to_wire()
            yield chunk
        if usage.at_end:
            yield {**self._head, "choices": [], "usage": self._generation.usage.to_wire()}

    async def body(self) -> JsonObject:
        folded = [_FoldedChoice() for _ in range(self._num_choices)]
        async for delta in self._generation.deltas():
            choice = folded[delta.index]
            text, entries = self._with_echo(delta)
            choice.text += text
            choice.entries += entries
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        choices = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": self._logprobs(index, choice.entries),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(folded)
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage.to_wire()}

    def _with_echo(self, delta: ChoiceDelta) -> tuple[str, list[TokenLogprobs | int]]:
        """Put the prompt in front of a choice's first text, its scores in front of the others."""
        entries: list[TokenLogprobs | int] = [*delta.prompt_logprobs, *delta.logprobs]
        if not self._request.echo or delta.index in self._started:
            return delta.text, entries
        self._started.add(delta.index)
        echo = self._echoes[delta.index // self._n]
        first: list[TokenLogprobs | int] = [echo.token_ids[0]]
        return echo.text + delta.text, first + entries

    def _logprobs(self, index: int, entries: list[TokenLogprobs | int]) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        return self._legacy[index].build(entries)
