"""POST /v1/completions: prompts in any of four shapes, echo, legacy log-probabilities."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.protocol.completions import CompletionRequest
from app.protocol.completions import Prompt as WirePrompt
from app.serving.answer import JsonObject, TextChunks, encode_json, usage_options
from app.serving.context import ServingContext
from app.serving.generation import Caller, ChoiceDelta, Generation, Prompt
from app.serving.logprobs import LegacyLogprobs, prompt_logprobs
from app.serving.params import check_ids, check_length, sampling_params, tokenize_text, truncated
from app.serving.structured import compile_demand, demand_of
from app.text.detokenize import IncrementalDetokenizer
from model.step import TokenLogprobs

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 1024  # more would never fit the engine's queue, however often they are sent


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedCompletion:
    """A request whose prompts are ready to be submitted; `echoes` are their texts."""

    request: CompletionRequest
    prompts: list[Prompt]
    echoes: list[str]


async def prepare_completion(
    context: ServingContext, request: CompletionRequest
) -> PreparedCompletion:
    """Check and tokenise. Raises ClientError before anything runs."""
    context.check_model(request.model)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if not max_tokens and not request.echo and request.prompt_logprobs is None:
        raise InvalidRequest(
            "'max_tokens' may be 0 only with 'echo' or 'prompt_logprobs'.", param="max_tokens"
        )
    count = _num_generated(request)
    if len(request.prompt) * count > MAX_CHOICES:
        raise InvalidRequest(
            f"'prompt' times 'n' may make at most {MAX_CHOICES} choices.", param="n"
        )
    is_ranked = count > (request.n or 1)
    wants_prompt = bool(request.echo) and request.logprobs is not None
    sampling = sampling_params(
        context,
        request,
        count=count,
        max_tokens=max_tokens,
        logprobs=0 if is_ranked and request.logprobs is None else request.logprobs,
        prompt_logprobs=request.logprobs if wants_prompt else None,
    )
    demand = demand_of(request)
    prompts: list[Prompt] = []
    echoes: list[str] = []
    for wire_prompt in request.prompt:
        whole = await _token_ids(context, request, wire_prompt)
        token_ids = truncated(context, request, whole)
        check_length(context, len(token_ids), max_tokens, param="prompt")
        constraints = await compile_demand(context, demand, len(sampling))
        prompts.append(Prompt(token_ids=token_ids, sampling=sampling, constraints=constraints))
        is_cut = len(token_ids) < len(whole)
        echoes.append(_text(context, token_ids if is_cut else wire_prompt))
        await asyncio.sleep(0)  # a thousand short prompts are long together: others get a turn
    return PreparedCompletion(request=request, prompts=prompts, echoes=echoes)


def start_completion(
    context: ServingContext, prepared: PreparedCompletion, request_id: str, caller: Caller
) -> "CompletionAnswer":
    """Submit. Raises ServerError if that cannot be."""
    prompts = prepared.prompts
    generation = Generation(context, prepared.request, request_id, prompts, caller)
    return CompletionAnswer(context, prepared, request_id, generation)


def _num_generated(request: CompletionRequest) -> int:
    """Return how many choices are generated for each prompt."""
    n, best_of = request.n or 1, request.best_of or request.n or 1
    if best_of < n:
        raise InvalidRequest("'best_of' must be at least 'n'.", param="best_of")
    if best_of > n and request.stream:
        raise InvalidRequest(
            "'best_of' chooses among whole answers, so it does not go with 'stream'.",
            param="best_of",
        )
    return best_of


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
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    logprob: float = 0.0  # of all its tokens together
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, len(self.token_ids))


class CompletionAnswer:
    """Answer over the deltas of a generation."""

    def __init__(
        self,
        context: ServingContext,
        prepared: PreparedCompletion,
        request_id: str,
        generation: Generation,
    ) -> None:
        self._context = context
        self._request = prepared.request
        self._prepared = prepared
        self._generation = generation
        self._num_each = len(prepared.prompts[0].sampling)  # choices generated for each prompt
        self._legacy = [
            LegacyLogprobs(
                context.tokenizer,
                self._request.logprobs or 0,
                as_ids=bool(self._request.return_tokens_as_token_ids),
            )
            for _ in range(len(prepared.prompts) * self._num_each)
        ]
        self._usage = usage_options(prepared.request)
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

    def timing(self) -> dict[str, float]:
        return self._generation.timing()

    def park(self) -> None:
        self._generation.park()

    async def resume(self) -> None:
        await self._generation.resume()

    def num_tokens(self) -> int:
        return self._generation.usage.num_tokens

    async def events(self) -> AsyncIterator[Sequence[bytes]]:
        """Yield a chunk a delta, then usage if asked for."""
        forms = self._text_forms()
        async for deltas in self._generation.deltas():
            yield [
                forms[delta.index].encode(delta.text)
                if forms and delta.finish_reason is None
                else encode_json(self._event(delta))
                for delta in deltas
            ]
        if self._usage.at_end:
            yield [encode_json({**self._chunk(), "usage": self._generation.usage.to_wire()})]

    def _text_forms(self) -> list[TextChunks]:
        """Return what makes each choice's chunks if its text is all they tell; else nothing."""
        request = self._request
        has_more = request.logprobs is not None or request.return_token_ids or request.echo
        if has_more or self._usage.in_each:
            return []

        def form(index: int) -> TextChunks:
            return TextChunks(lambda text: self._chunk(self._wire_choice(index, text)))

        return [form(index) for index in range(len(self._legacy))]

    def _chunk(self, *choices: JsonObject) -> JsonObject:
        return {**self._head, "choices": choices}

    def _wire_choice(self, index: int, text: str) -> JsonObject:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def _event(self, delta: ChoiceDelta) -> JsonObject:
        """Return the chunk of a delta."""
        is_first = delta.index not in self._started
        text, entries = self._with_echo(delta)
        choice = self._wire_choice(delta.index, text)
        choice["logprobs"] = self._logprobs(delta.index, entries)
        choice["finish_reason"] = delta.finish_reason
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompt(delta.index).token_ids
        chunk = self._chunk(choice)
        if self._usage.in_each:
            chunk["usage"] = self._generation.usage.to_wire()
        return chunk

    async def body(self) -> JsonObject:
        folded = [_FoldedChoice() for _ in self._legacy]
        async for deltas in self._generation.deltas():
            for delta in deltas:
                choice = folded[delta.index]
                text, entries = self._with_echo(delta)
                choice.text += text
                choice.entries += entries
                choice.token_ids += delta.token_ids
                choice.prompt_logprobs += delta.prompt_logprobs
                choice.logprob += sum(entry.logprob for entry in delta.logprobs)
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        kept = self._best(folded)
        choices = [self._choice(index, folded[place], place) for index, place in enumerate(kept)]
        return {**self._head, "choices": choices, "usage": self._generation.usage.to_wire()}

    def _best(self, folded: list[_FoldedChoice]) -> list[int]:
        """Return the places of the choices to give out: all, or the most likely of each prompt."""
        n = self._request.n or 1
        if n == self._num_each:
            return list(range(len(folded)))
        places: list[int] = []
        for first in range(0, len(folded), self._num_each):
            own = range(first, first + self._num_each)
            places += sorted(own, key=lambda place: -folded[place].mean_logprob)[:n]
        return places

    def _choice(self, index: int, choice: _FoldedChoice, place: int) -> JsonObject:
        wire: JsonObject = {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(place, choice.entries),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            wire["token_ids"] = choice.token_ids
            wire["prompt_token_ids"] = self._prompt(place).token_ids
        if self._request.prompt_logprobs is not None:
            wire["prompt_logprobs"] = prompt_logprobs(
                self._context.tokenizer, choice.prompt_logprobs
            )
        return wire

    def _prompt(self, place: int) -> Prompt:
        return self._prepared.prompts[place // self._num_each]

    def _with_echo(self, delta: ChoiceDelta) -> tuple[str, list[TokenLogprobs | int]]:
        """Put the prompt in front of a choice's first text, its scores in front of the others."""
        entries: list[TokenLogprobs | int] = list(delta.logprobs)
        if self._request.echo:
            entries = [*delta.prompt_logprobs, *entries]
        if delta.index in self._started:
            return delta.text, entries
        self._started.add(delta.index)
        if not self._request.echo:
            return delta.text, entries
        first: list[TokenLogprobs | int] = [self._prompt(delta.index).token_ids[0]]
        echo = self._prepared.echoes[delta.index // self._num_each]
        return echo + delta.text, first + entries

    def _logprobs(self, place: int, entries: list[TokenLogprobs | int]) -> JsonObject | None:
        if self._request.logprobs is None:
            return None
        return self._legacy[place].build(entries)
