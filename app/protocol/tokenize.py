"""The bodies of POST /tokenize and POST /detokenize, as vLLM has them."""

from typing import Annotated

from pydantic import FailFast, Field

from app.protocol.chat import ChatMessage
from app.protocol.common import TokenIds, WireModel


class TokenizeRequest(WireModel):
    """A text, or a conversation to be put through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], FailFast(), Field(max_length=4096, default_factory=list)]
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    """Token ids to be turned into text."""

    model: str | None = None
    tokens: TokenIds
