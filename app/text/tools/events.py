"""What a text with tool calls is made of, in the order that it comes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a known function begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all of them joined are the text of a JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete."""

    index: int


ToolEvent = Content | CallStart | CallArguments | CallEnd
