"""Messages of a request into ids: as the model's template wants them, control tokens kept out."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import InvalidRequest
from app.protocol.chat import ChatMessage
from app.serving.context import ServingContext
from app.serving.params import OFFLOADED_CHARACTERS, check_characters
from app.serving.tools import ToolUse
from app.text.chat_template import ChatTemplate, encode_chat
from app.text.tools.grammar import call_text, tools_prompt
from model.errors import TokenizerError

# What the server itself passes to the template.
RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
TemplateKwargs = dict[str, str | bool | int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a conversation is put through the template."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: ToolUse | None = None
    kwargs: TemplateKwargs | None = None
    parse_special: bool = False


async def encode_messages(
    context: ServingContext, messages: Sequence[ChatMessage], rendering: Rendering
) -> list[int]:
    """Return the ids of a conversation; control tokens come from the template alone."""
    template = context.chat_template
    if template is None:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions or start the server with "
            "--chat-template.",
            param="messages",
        )
    if reserved := RESERVED_KWARGS.intersection(rendering.kwargs or ()):
        raise InvalidRequest(
            f"'chat_template_kwargs' may not set {sorted(reserved)[0]}.",
            param="chat_template_kwargs",
        )
    tools = rendering.tools
    num_characters = sum(_num_characters(message) for message in messages)
    check_characters(context, num_characters, "messages")
    if tools is not None:
        num_tool_characters = len(json.dumps(tools.shown, ensure_ascii=False))
        check_characters(context, num_tool_characters, "tools")
        num_characters += num_tool_characters
    plain = [_to_template(message, template) for message in messages]
    if not template.uses_tools:
        plain = _with_calls_in_words(context, plain, tools)

    def encode() -> list[int]:
        return encode_chat(
            context.tokenizer,
            template,
            plain,
            add_generation_prompt=rendering.add_generation_prompt,
            continue_final_message=rendering.continue_final_message,
            tools=tools.shown if tools and template.uses_tools else None,
            kwargs=rendering.kwargs,
            parse_special_content=rendering.parse_special,
        )

    try:
        is_long = num_characters > OFFLOADED_CHARACTERS
        return await asyncio.to_thread(encode) if is_long else encode()
    except TokenizerError as error:
        raise InvalidRequest(f"'messages': {error}.", param="messages") from None


def _num_characters(message: ChatMessage) -> int:
    arguments = sum(len(call.function.arguments) for call in message.tool_calls)
    return len(message.content or "") + arguments


def _to_template(message: ChatMessage, template: ChatTemplate) -> dict[str, object]:
    """Return a message as templates know them."""
    plain = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    if message.role == "developer" and not template.mentions("developer"):
        plain["role"] = "system"  # OpenAI's newer name for it
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
        plain.setdefault("content", "")
    return plain


def _with_calls_in_words(
    context: ServingContext, messages: list[dict[str, object]], tools: ToolUse | None
) -> list[dict[str, object]]:
    """Return a conversation for a template that knows no tools: all about them is in its texts."""
    words: list[dict[str, object]] = []
    for message in messages:
        plain = dict(message)
        calls = plain.pop("tool_calls", None)
        if isinstance(calls, list):
            texts = [_call_text(context, call["function"]) for call in calls]
            said = [str(plain["content"])] if plain["content"] else []
            plain["content"] = "\n".join([*said, *texts])
        if plain["role"] == "tool":
            result = f"<tool_response>\n{plain.get('content') or ''}\n</tool_response>"
            plain = {"role": "user", "content": result}
        words.append(plain)
    if tools is None:
        return words
    told = tools_prompt(context.tool_format, tools.shown)
    if words and words[0]["role"] == "system":
        first = {**words[0], "content": f"{told}\n\n{words[0].get('content') or ''}"}
        return [first, *words[1:]]
    return [{"role": "system", "content": told}, *words]


def _call_text(context: ServingContext, function: dict[str, object]) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call_text(context.tool_format, str(function["name"]), text)


def _arguments(text: str) -> object:
    """Return a call's arguments as the object that templates print; other text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
