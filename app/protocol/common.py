"""What all request bodies share: strict JSON, one error at most, sampling fields.

A body is validated once. A validator stops at the first fault of a list, so that a hostile body
cannot make more work, or a longer answer, than an honest one. Explicit null means absent.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, from_json

from app.errors import InvalidRequest

MAX_STOPS = 4
MAX_BAD_WORDS = 128
MAX_CHOICES = 2000
MAX_TEXT_SHOWN = 100
MAX_TOKEN_ID = 2**31

# Known to OpenAI's API or to other servers, and not done here: refused unless they say the same
# as their absence. Silence would be an answer that is wrong.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
    "prompt_embeds": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "logits_processors": ([],),
    "documents": ([],),
    "chat_template": (),
    "stop_regex": (),
    "typical_p": (1, 1.0),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Say something about the request, nothing about its answer.
HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class WireModel(BaseModel):
    """A strict body or part of one; fields it does not know are kept aside."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    def ignored_fields(self) -> list[str]:
        """Return the names of fields that have no effect. Raises InvalidRequest for unsupported."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            if value is None:
                continue
            if name in UNSUPPORTED:
                if value not in UNSUPPORTED[name]:
                    raise InvalidRequest(f"'{name}' is not supported by this server.", param=name)
            elif name not in HARMLESS:
                ignored.append(name)
        for name in type(self).model_fields:
            value = getattr(self, name)
            # Not those in lists: what messages and tools have besides reaches the template.
            if isinstance(value, WireModel):
                ignored += [f"{name}.{inner}" for inner in value.ignored_fields()]
        return ignored


def _to_stops(value: object) -> object:
    """Accept a string or up to four, none of them empty."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops[:5]):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", "may hold at most 4 strings")
    if not all(0 < len(stop) <= 1024 for stop in stops):
        raise PydanticCustomError("stop", "strings must have 1 to 1024 characters")
    return stops


def check_token_ids(value: object, field: str = "token_ids") -> list[int]:
    """Return a list of token ids, checked up to its first fault."""
    if not isinstance(value, list):
        raise PydanticCustomError(field, "must be a list of token ids")
    for item in value:
        if type(item) is not int or not 0 <= item < MAX_TOKEN_ID:
            raise PydanticCustomError(field, "token ids must be integers from 0 on")
    return value


def _strings(most: int) -> PlainValidator:
    """Return a validator of a list of short strings that stops at the first fault."""

    def check(value: object) -> list[str]:
        if not isinstance(value, list) or len(value) > most:
            raise PydanticCustomError(
                "strings", "must be a list of at most {most} strings", {"most": most}
            )
        if not all(isinstance(word, str) and 0 < len(word) <= 1024 for word in value):
            raise PydanticCustomError("strings", "must be strings of 1 to 1024 characters")
        return value

    return PlainValidator(check)


IDS_SCHEMA: Mapping[str, object] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID - 1},
}
_STRING_SCHEMA: Mapping[str, object] = {"type": "string", "minLength": 1, "maxLength": 1024}
_NULL_SCHEMA: Mapping[str, object] = {"type": "null"}


def _strings_schema(most: int) -> dict[str, object]:
    return {"type": "array", "items": _STRING_SCHEMA, "maxItems": most}


_STOPS_SCHEMA = {"anyOf": [_STRING_SCHEMA, _strings_schema(MAX_STOPS), _NULL_SCHEMA]}
# Validated by hand: pydantic collects every fault of a list unless told otherwise.
TokenIds = Annotated[list[int], PlainValidator(check_token_ids), WithJsonSchema(dict(IDS_SCHEMA))]
BadWords = Annotated[
    list[str], _strings(MAX_BAD_WORDS), WithJsonSchema(_strings_schema(MAX_BAD_WORDS))
]
Choices = Annotated[list[str], _strings(MAX_CHOICES), WithJsonSchema(_strings_schema(MAX_CHOICES))]


def at_most(num_entries: int) -> BeforeValidator:
    """Return a validator that refuses a larger object before any of its values is looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > num_entries:
            raise PydanticCustomError(
                "too_long", "may hold at most {most} entries", {"most": num_entries}
            )
        return value

    return BeforeValidator(check)


class StreamOptions(WireModel):
    """What a stream reports besides tokens."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


JsonSchema = Annotated[dict[str, object] | str, Field(union_mode="left_to_right")]
Pattern = Annotated[str, Field(min_length=1)]


class NamedSchema(WireModel):
    """The `json_schema` of a response format."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(WireModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(WireModel):
    """vLLM's way to ask for a form of text: exactly one of the first five."""

    json_: Annotated[JsonSchema | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    whitespace_pattern: Pattern | None = None
    disable_any_whitespace: Literal[True] | None = None  # as it is here anyway


class SamplingFields(WireModel):
    """The fields that completions and chat have in common; ranges are OpenAI's."""

    model: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(1024)] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_to_stops), WithJsonSchema(_STOPS_SCHEMA)] = []
    stop_token_ids: TokenIds | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: BadWords | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    parse_special: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_prompt: bool | None = None  # False: no K/V is taken from the prefix cache
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    guided_whitespace_pattern: Pattern | None = None
    json_schema: JsonSchema | None = None


Model = TypeVar("Model", bound=WireModel)


def parse_json(body: bytes) -> dict[str, object]:
    """Read a JSON object strictly: UTF-8, finite numbers, no lone surrogates."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = str(error)[:MAX_TEXT_SHOWN]
        raise InvalidRequest(f"The body is not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return value


def validate(model: type[Model], value: dict[str, object]) -> Model:
    """Return the validated body; raises InvalidRequest that names the first faulty field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Names of union members are ours, not the client's.
        path = [str(part) for part in first["loc"] if "[" not in str(part)]
        param = ".".join(path)[:MAX_TEXT_SHOWN] or None
        place = f"'{param}': " if param else ""
        raise InvalidRequest(f"{place}{first['msg']}."[:400], param=param) from None
