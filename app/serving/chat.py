"""POST /v1/chat/completions: messages through the model's template, deltas of one message."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.protocol.chat import ChatRequest
from app.serving.answer import JsonObject, TextChunks, encode_json, usage_options
from app.serving.context import ServingContext
from app.serving.conversation import Rendering, TemplateKwargs, encode_messages
from app.serving.generation import Caller, ChoiceDelta, Generation, Prompt
from app.serving.logprobs import chat_logprobs, prompt_logprobs
from app.serving.message import MessageReader, MessageWriter, join_fragments
from app.serving.params import check_length, sampling_params, truncated
from app.serving.structured import compile_demand, demand_of
from app.serving.tools import ToolUse, tool_use_of
from app.text.reasoning import ReasoningSplitter
from model.step import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedChat:
    """A conversation that is ready to be submitted."""

    request: ChatRequest
    prompt: Prompt
    tools: ToolUse | None
    starts_reasoning: bool  # the prompt ends inside of think tags

    @property
    def prompts(self) -> list[Prompt]:
        return [self.prompt]


async def prepare_chat(context: ServingContext, request: ChatRequest) -> PreparedChat:
    """Check, render and tokenise. Raises ClientError before anything runs."""
    context.check_model(request.model)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs'.", param="top_logprobs")
    demand = demand_of(request)
    tools = tool_use_of(context, request, demand)
    if tools is not None:
        demand = tools.demand
    rendering = Rendering(
        add_generation_prompt=(
            request.add_generation_prompt is not False and not request.continue_final_message
        ),
        continue_final_message=bool(request.continue_final_message),
        tools=tools,
        kwargs=_template_kwargs(request),
        parse_special=bool(request.parse_special),
    )
    token_ids = truncated(
        context, request, await encode_messages(context, request.messages, rendering)
    )
    wanted = request.max_completion_tokens or request.max_tokens
    max_tokens = check_length(context, len(token_ids), wanted, param="messages")
    sampling = sampling_params(
        context,
        request,
        count=request.n or 1,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    constraints = await compile_demand(context, demand, len(sampling))
    return PreparedChat(
        request=request,
        prompt=Prompt(
            token_ids=token_ids,
            sampling=sampling,
            constraints=constraints,
            shown_token_ids=(context.tag_token_ids if tools or context.think_tags else frozenset()),
        ),
        tools=tools,
        # What a form is demanded of is an answer from its first token on.
        starts_reasoning=demand is None and _ends_inside_think_tags(context, token_ids),
    )


def start_chat(
    context: ServingContext, prepared: PreparedChat, request_id: str, caller: Caller
) -> "ChatAnswer":
    """Submit. Raises ServerError if that cannot be."""
    prompts = [prepared.prompt]
    generation = Generation(context, prepared.request, request_id, prompts, caller)
    return ChatAnswer(context, prepared, request_id, generation)


def _template_kwargs(request: ChatRequest) -> TemplateKwargs | None:
    kwargs = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    return kwargs or None


def _ends_inside_think_tags(context: ServingContext, token_ids: list[int]) -> bool:
    """Say whether the template has opened the think tag for the model already."""
    if context.think_tags is None:
        return False
    end = b"".join(context.tokenizer.token_bytes(token_id) for token_id in token_ids[-16:])
    return end.rstrip().endswith(context.think_tags[0].encode())


@dataclass(slots=True)
class _Choice:
    """One choice under way."""

    reader: MessageReader
    writer: MessageWriter
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatAnswer:
    """Answer over the deltas of a generation."""

    def __init__(
        self,
        context: ServingContext,
        prepared: PreparedChat,
        request_id: str,
        generation: Generation,
    ) -> None:
        self._context = context
        self._request = prepared.request
        self._prepared = prepared
        self._generation = generation
        self._usage = usage_options(prepared.request)
        self._choices = [self._new_choice() for _ in prepared.prompt.sampling]
        self._head: JsonObject = {
            "id": f"chatcmpl-{request_id}",
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
        """Yield the role of each choice, a chunk a delta, then usage if asked for."""
        roles = []
        for index in range(len(self._choices)):
            chunk = self._chunk(self._wire_choice(index, {"role": "assistant", "content": ""}))
            if self._request.return_token_ids and not index:
                chunk["prompt_token_ids"] = self._prepared.prompt.token_ids
            roles.append(encode_json(chunk))
        yield roles
        forms = self._text_forms()
        async for pieces in self._generation.deltas():
            chunks: list[bytes] = []
            for piece in pieces:
                if forms and piece.finish_reason is None:
                    chunks.append(forms[piece.index].encode(piece.text))
                elif (event := self._event(piece)) is not None:
                    chunks.append(encode_json(event))
            if chunks:
                yield chunks
        if self._usage.at_end:
            yield [encode_json({**self._chunk(), "usage": self._generation.usage.to_wire()})]

    def _text_forms(self) -> list[TextChunks]:
        """Return what makes each choice's chunks if its text is all that they tell; else nothing.

        Then nothing of a piece is held back, and what no reader of a stream asks for is not kept.
        """
        request = self._request
        has_more = request.logprobs or request.return_token_ids or self._usage.in_each
        is_scored = request.prompt_logprobs is not None
        if has_more or is_scored or any(choice.reader.holds_back for choice in self._choices):
            return []

        def form(index: int) -> TextChunks:
            return TextChunks(lambda text: self._chunk(self._wire_choice(index, {"content": text})))

        return [form(index) for index in range(len(self._choices))]

    def _chunk(self, *choices: JsonObject) -> JsonObject:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _wire_choice(self, index: int, delta: JsonObject) -> JsonObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _event(self, piece: ChoiceDelta) -> JsonObject | None:
        """Return the chunk of a piece; None while it is held back: it may be part of a call."""
        delta = self._take(piece)
        reason = self._choices[piece.index].finish_reason
        if not (delta or reason or self._request.logprobs or self._request.return_token_ids):
            return None
        choice = self._wire_choice(piece.index, delta)
        choice |= {"logprobs": self._logprobs(piece.logprobs), "finish_reason": reason}
        if piece.stop_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        chunk = self._chunk(choice)
        if self._usage.in_each:
            chunk["usage"] = self._generation.usage.to_wire()
        return chunk

    async def body(self) -> JsonObject:
        async for pieces in self._generation.deltas():
            for piece in pieces:
                self._take(piece)
                choice = self._choices[piece.index]
                choice.logprobs += piece.logprobs
                choice.prompt_logprobs += piece.prompt_logprobs
                choice.token_ids += piece.token_ids
                choice.stop_reason = piece.stop_reason
        body: JsonObject = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._wire(*numbered) for numbered in enumerate(self._choices)],
            "usage": self._generation.usage.to_wire(),
        }
        if self._request.return_token_ids:
            body["prompt_token_ids"] = self._prepared.prompt.token_ids
        if self._request.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(
                self._context.tokenizer, self._choices[0].prompt_logprobs
            )
        return body

    def _new_choice(self) -> _Choice:
        tools, tags = self._prepared.tools, self._context.think_tags
        splitter = None
        if tags is not None:
            splitter = ReasoningSplitter(*tags, starts_inside=self._prepared.starts_reasoning)
        return _Choice(
            reader=MessageReader(
                splitter,
                tools.reader() if tools else None,
                ends_with_call=tools is not None and not tools.is_parallel,
                has_content=tools is None or not tools.is_forced,
            ),
            writer=MessageWriter(include_reasoning=self._request.include_reasoning is not False),
        )

    def _take(self, piece: ChoiceDelta) -> JsonObject:
        """Read a piece of text; return the delta that it makes. The last one ends the choice."""
        choice = self._choices[piece.index]
        if choice.finish_reason is not None:
            return {}
        read = choice.reader.push(piece.text)
        delta = choice.writer.write(read)
        tools = self._prepared.tools
        if tools is not None and not tools.is_parallel and read.num_ended:
            # One call was allowed, and there it is.
            self._generation.finish(piece.index)
            choice.finish_reason = "tool_calls"
        elif piece.finish_reason is not None:
            _extend(delta, choice.writer.write(choice.reader.finish()))
            is_call = choice.writer.has_calls and piece.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if is_call else piece.finish_reason
        if not delta and piece.token_ids and not choice.reader.holds_back:
            delta["content"] = ""  # a token that shows nothing yet is still told of
        return delta

    def _wire(self, index: int, choice: _Choice) -> JsonObject:
        wire: JsonObject = {
            "index": index,
            "message": choice.writer.message(),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            wire["token_ids"] = choice.token_ids
        return wire

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> JsonObject | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            self._context.tokenizer,
            entries,
            skip_special_tokens=self._request.skip_special_tokens is not False,
            as_ids=bool(self._request.return_tokens_as_token_ids),
        )


def _extend(delta: JsonObject, more: JsonObject) -> None:
    """Add what came last to a delta."""
    for key, value in more.items():
        before = delta.get(key)
        if isinstance(before, list) and isinstance(value, list):
            delta[key] = join_fragments([*before, *value])
        elif isinstance(before, str) and isinstance(value, str):
            delta[key] = f"{before}{value}"
        else:
            delta[key] = value
