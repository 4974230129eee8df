"""POST /v1/chat/completions: messages through the model's template, deltas of one message."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from app.errors import InvalidRequest
from app.protocol.chat import ChatMessage, ChatRequest
from app.serving.answer import JsonObject, usage_options
from app.serving.context import ServingContext
from app.serving.generation import Generation, Prompt
from app.serving.logprobs import chat_logprobs
from app.serving.params import (
    OFFLOADED_CHARACTERS,
    check_characters,
    check_length,
    sampling_params,
)
from app.serving.structured import compile_demand, demand_of
from app.text.chat_template import encode_chat
from model.errors import TokenizerError
from model.step import TokenLogprobs

# What the server itself passes to the template.
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


async def start_chat(
    context: ServingContext, request: ChatRequest, request_id: str
) -> "ChatAnswer":
    """Render, tokenise and submit. Raises ClientError before anything runs."""
    context.check_model(request.model)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs'.", param="top_logprobs")
    token_ids = await encode_messages(
        context,
        request.messages,
        add_generation_prompt=request.add_generation_prompt is not False
        and not request.continue_final_message,
        continue_final_message=bool(request.continue_final_message),
        kwargs=request.chat_template_kwargs,
        parse_special=bool(request.parse_special),
    )
    wanted = request.max_completion_tokens or request.max_tokens
    max_tokens = check_length(context, len(token_ids), wanted)
    sampling = sampling_params(
        context,
        request,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    constraints = await compile_demand(context, demand_of(request), len(sampling))
    prompt = Prompt(token_ids=token_ids, sampling=sampling, constraints=constraints)
    generation = Generation(context, request, request_id, [prompt])
    return ChatAnswer(context, request, request_id, generation)


async def encode_messages(
    context: ServingContext,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    kwargs: dict[str, str | bool | int | float] | None = None,
    parse_special: bool = False,
) -> list[int]:
    """Return the ids of a conversation; control tokens come from the template alone."""
    template = context.chat_template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions or start the server with "
            "--chat-template.",
            param="messages",
        )
    if reserved := RESERVED_KWARGS.intersection(kwargs or ()):
        raise InvalidRequest(
            f"'chat_template_kwargs' may not set {sorted(reserved)[0]}.",
            param="chat_template_kwargs",
        )
    plain = [message.model_dump(exclude_none=True) for message in messages]
    num_characters = sum(len(message.content or "") for message in messages)
    check_characters(context, num_characters, "messages")

    def encode() -> list[int]:
        return encode_chat(
            context.tokenizer,
            template,
            plain,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
            parse_special_content=parse_special,
        )

    try:
        is_long = num_characters > OFFLOADED_CHARACTERS
        return await asyncio.to_thread(encode) if is_long else encode()
    except TokenizerError as error:
        raise InvalidRequest(f"'messages': {error}.", param="messages") from None


@dataclass(slots=True)
class _FoldedChoice:
    """A choice as its deltas add up."""

    content: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatAnswer:
    """Answer over the deltas of a generation."""

    def __init__(
        self, context: ServingContext, request: ChatRequest, request_id: str, generation: Generation
    ) -> None:
        self._context = context
        self._request = request
        self._generation = generation
        self._num_choices = request.n or 1
        self._head: JsonObject = {
            "id": f"chatcmpl-{request_id}",
            "created": int(time.time()),
            "model": context.model_names[0],
            "system_fingerprint": context.system_fingerprint,
        }

    def abort(self) -> None:
        self._generation.abort()

    async def events(self) -> AsyncIterator[JsonObject]:
        """Yield the role of each choice, a chunk a delta, then usage if asked for."""
        usage = usage_options(self._request)
        head = {**self._head, "object": "chat.completion.chunk"}
        for index in range(self._num_choices):
            delta: JsonObject = {"role": "assistant", "content": ""}
            choice: JsonObject = {"index": index, "delta": delta, "finish_reason": None}
            yield {**head, "choices": [choice | {"logprobs": None}]}
        async for piece in self._generation.deltas():
            choice = {
                "index": piece.index,
                "delta": {"content": piece.text} if piece.text or piece.token_ids else {},
                "logprobs": self._logprobs(piece.logprobs),
                "finish_reason": piece.finish_reason,
            }
            if piece.stop_reason is not None:
                choice["stop_reason"] = piece.stop_reason
            chunk = {**head, "choices": [choice]}
            if usage.in_each:
                chunk["usage"] = self._generation.usage.to_wire()
            yield chunk
        if usage.at_end:
            yield {**head, "choices": [], "usage": self._generation.usage.to_wire()}

    async def body(self) -> JsonObject:
        folded = [_FoldedChoice() for _ in range(self._num_choices)]
        async for piece in self._generation.deltas():
            choice = folded[piece.index]
            choice.content += piece.text
            choice.logprobs += piece.logprobs
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.content, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(folded)
        ]
        usage = self._generation.usage.to_wire()
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> JsonObject | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            self._context.tokenizer,
            entries,
            skip_special_tokens=self._request.skip_special_tokens is not False,
        )
