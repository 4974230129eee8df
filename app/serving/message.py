"""One choice of a chat as it is said: its text parted into reasoning, content and tool calls.

The one state machine under streamed and whole answers: a delta is ready for the wire, and `Fold`
adds deltas up to the message that a stream's reader would have.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.serving.answer import JsonObject
from app.text.reasoning import ReasoningSplitter
from app.text.tools.events import CallArguments, CallEnd, CallStart, Content, ToolEvent
from app.text.tools.reader import CallReader


@dataclass(frozen=True, slots=True)
class MessageDelta:
    """What a piece of text adds to the message; `num_ended` counts the calls that it completed."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallStart | CallArguments, ...] = ()
    num_ended: int = 0


class MessageReader:
    """Reads one choice's text, in pieces as they come.

    With `ends_with_call` what a piece holds behind the first whole call is dropped; without
    `has_content` whatever is no call is a call cut short.
    """

    def __init__(
        self,
        splitter: ReasoningSplitter | None,
        parser: CallReader | None,
        *,
        ends_with_call: bool = False,
        has_content: bool = True,
    ) -> None:
        self._splitter = splitter
        self._parser = parser
        self._ends_with_call = ends_with_call
        self._has_content = has_content

    @property
    def holds_back(self) -> bool:
        """Whether a piece of text may show nothing because of what may follow it."""
        return self._splitter is not None or self._parser is not None

    def push(self, text: str) -> MessageDelta:
        if self._splitter is None:
            return self._read("", text)
        parted = self._splitter.push(text)
        return self._read(parted.reasoning, parted.content)

    def finish(self) -> MessageDelta:
        """Return what was held back: no more text will come."""
        reasoning = content = ""
        if self._splitter is not None:
            parted = self._splitter.finish()
            reasoning, content = parted.reasoning, parted.content
        return self._read(reasoning, content, is_last=True)

    def _read(self, reasoning: str, text: str, *, is_last: bool = False) -> MessageDelta:
        if self._parser is None:
            return MessageDelta(reasoning, text)
        events = self._parser.push(text) if text else []
        if is_last:
            events = [*events, *self._parser.finish()]
        if not self._has_content:
            events = [event for event in events if not isinstance(event, Content)]
        if self._ends_with_call:
            kinds = [type(event) for event in events]
            events = events[: kinds.index(CallEnd) + 1] if CallEnd in kinds else events
        return _delta(reasoning, events)


def _delta(reasoning: str, events: Sequence[ToolEvent]) -> MessageDelta:
    return MessageDelta(
        reasoning=reasoning,
        content="".join(event.text for event in events if isinstance(event, Content)),
        calls=tuple(event for event in events if isinstance(event, CallStart | CallArguments)),
        num_ended=sum(isinstance(event, CallEnd) for event in events),
    )


def join_fragments(fragments: Sequence[JsonObject]) -> list[JsonObject]:
    """Return one fragment a call: openai 2.x takes the first chunk's list as one call an entry."""
    joined: dict[object, JsonObject] = {}
    for fragment in fragments:
        before = joined.setdefault(fragment["index"], fragment)
        if before is not fragment:
            first, more = before["function"], fragment["function"]
            assert isinstance(first, dict)
            assert isinstance(more, dict)
            before["function"] = first | {"arguments": first["arguments"] + more["arguments"]}
    return list(joined.values())


@dataclass(slots=True)
class _FoldedCall:
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class MessageWriter:
    """Turns the deltas of one choice into the wire's, and adds them up."""

    def __init__(self, *, include_reasoning: bool) -> None:
        self._include_reasoning = include_reasoning
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_FoldedCall] = []

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def write(self, delta: MessageDelta) -> JsonObject:
        """Return a chunk's delta, without the fields that have nothing to say."""
        wire: JsonObject = {}
        if delta.reasoning and self._include_reasoning:
            self._reasoning.append(delta.reasoning)
            # The first is what vLLM has now, the second what it had and DeepSeek's API has.
            wire |= {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
        if delta.content:
            self._content.append(delta.content)
            wire["content"] = delta.content
        if delta.calls:
            wire["tool_calls"] = join_fragments([self._call(event) for event in delta.calls])
        return wire

    def message(self) -> JsonObject:
        """Return the whole message."""
        content = "".join(self._content)
        message: JsonObject = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
        }
        if self._reasoning:
            reasoning = "".join(self._reasoning)
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.arguments)},
                }
                for call in self._calls
            ]
        return message

    def _call(self, event: CallStart | CallArguments) -> JsonObject:
        if isinstance(event, CallArguments):
            self._calls[event.index].arguments.append(event.text)
            return {"index": event.index, "function": {"arguments": event.text}}
        call = _FoldedCall(f"call_{secrets.token_hex(12)}", event.name)
        self._calls.append(call)
        return {
            "index": event.index,
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
