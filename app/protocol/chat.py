"""The body of POST /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import FailFast, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.protocol.common import SamplingFields, WireModel, at_most
from app.protocol.tools import ToolCalls, Tools, WireToolChoice


def _to_text(value: object) -> str | None:
    """Accept a string, null or a list of text parts, which are joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
            raise PydanticCustomError("content", "only parts of type 'text' are supported")
        text = part.get("text")
        if not isinstance(text, str):
            raise PydanticCustomError("content", "a text part must have a string 'text'")
        texts.append(text)
    return "".join(texts)


_TEXT_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "input_text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART_SCHEMA}, {"type": "null"}]
}


class ChatMessage(WireModel):
    """One message. Fields beyond these reach the template if it looks for them."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, PlainValidator(_to_text), WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: ToolCalls = Field(default_factory=list)
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None


class ChatRequest(SamplingFields):
    """OpenAI's chat completion, with vLLM's extra fields."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, str | bool | int | float], at_most(16)] | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: WireToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
