"""Tools on the wire: what may be called, what must be, and what was, in OpenAI's form."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, FailFast, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.protocol.common import WireModel

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(WireModel):
    """A function that may be called, with the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(WireModel):
    """A tool; functions are all there is."""

    type: Literal["function"]
    function: FunctionDefinition


class CalledFunction(WireModel):
    """The function of a call that was made; arguments are the text of a JSON object."""

    name: FunctionName
    arguments: str = "{}"


class ToolCall(WireModel):
    """A call that an assistant made earlier in the conversation."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


def _to_tool_choice(value: object) -> "ToolChoice":
    """Accept none, auto, required, a named function or a list of allowed ones."""
    if value in ("none", "auto", "required"):
        return ToolChoice(mode=str(value))
    if isinstance(value, dict):
        kind = value.get("type")
        if kind == "function":
            return ToolChoice(mode="named", names=(_name_of(value),))
        allowed = value.get("allowed_tools")
        if kind == "allowed_tools" and isinstance(allowed, dict):
            mode, tools = allowed.get("mode"), allowed.get("tools")
            if mode in ("auto", "required") and isinstance(tools, list) and 0 < len(tools) <= 128:
                return ToolChoice(mode=str(mode), names=tuple(_name_of(tool) for tool in tools))
    raise PydanticCustomError(
        "tool_choice", "must be none, auto, required, a function or allowed_tools"
    )


def _name_of(value: object) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError("tool_choice", "must name a function: {'function': {'name': …}}")
    return name


class ToolChoice(WireModel):
    """Which tools may be called; `names` empty: any of them."""

    mode: str  # none, auto, required or named
    names: tuple[str, ...] = ()


_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _FUNCTION_SCHEMA,
        {
            "type": "object",
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {
                            "type": "array",
                            "items": _FUNCTION_SCHEMA,
                            "minItems": 1,
                            "maxItems": MAX_TOOLS,
                        },
                    },
                    "required": ["mode", "tools"],
                },
            },
            "required": ["type", "allowed_tools"],
        },
    ]
}
WireToolChoice = Annotated[
    ToolChoice, PlainValidator(_to_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)
]


def _null_is_empty(value: object) -> object:
    return [] if value is None else value


# Not `| None`: pydantic's FailFast does not go into a union. The document says it all the same.
_AtMost = Field(max_length=MAX_TOOLS)
_NullableTools = Annotated[list[Tool], _AtMost] | None
_NullableCalls = Annotated[list[ToolCall], _AtMost] | None
Tools = Annotated[
    list[Tool],
    FailFast(),
    _AtMost,
    BeforeValidator(_null_is_empty, json_schema_input_type=_NullableTools),
]
ToolCalls = Annotated[
    list[ToolCall],
    FailFast(),
    _AtMost,
    BeforeValidator(_null_is_empty, json_schema_input_type=_NullableCalls),
]
