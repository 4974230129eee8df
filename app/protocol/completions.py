"""The body of POST /v1/completions."""

from typing import Annotated

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.protocol.common import IDS_SCHEMA, SamplingFields, check_token_ids

MAX_PROMPTS = 1024

Prompt = str | list[int]


def _to_prompts(value: object) -> list[Prompt]:
    """Accept a string, strings, ids or lists of ids; stop at the first fault."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of those"
        )
    if type(value[0]) is int:
        return [_to_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", "may hold at most 1024 prompts")
    kind = type(value[0])
    if kind not in (str, list) or any(type(item) is not kind for item in value):
        raise PydanticCustomError("prompt", "must be all strings or all lists of token ids")
    return list(value) if kind is str else [_to_ids(item) for item in value]


def _to_ids(value: list[object]) -> list[int]:
    if not value:
        raise PydanticCustomError("prompt", "may not hold an empty list of token ids")
    return check_token_ids(value, "prompt")


_SOME_IDS_SCHEMA = {**IDS_SCHEMA, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _SOME_IDS_SCHEMA,
        {"type": "array", "items": _SOME_IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


class CompletionRequest(SamplingFields):
    """OpenAI's legacy completion, with vLLM's extra fields."""

    prompt: Annotated[list[Prompt], PlainValidator(_to_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    add_special_tokens: bool | None = None
