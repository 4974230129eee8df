"""What a chat request's tools come to: what the model is told, what it must say, how it is read."""

import json
from dataclasses import dataclass, replace

from app.errors import InvalidRequest
from app.protocol.chat import ChatRequest
from app.protocol.tools import Tool, ToolChoice
from app.serving.context import ServingContext
from app.serving.structured import Demand
from app.text.grammar.spec import text_spec
from app.text.tools.grammar import tools_grammar
from app.text.tools.parser import READERS, ToolFormat
from app.text.tools.reader import CallReader


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one request. `demand` is the form that calls and answers must have, if any."""

    format: ToolFormat
    shown: list[dict[str, object]]  # in the prompt
    names: frozenset[str]  # that may be called
    demand: Demand | None
    is_forced: bool  # nothing but calls is said
    is_parallel: bool

    def reader(self) -> CallReader:
        return READERS[self.format](self.names)


def tool_use_of(
    context: ServingContext, request: ChatRequest, answer: Demand | None
) -> ToolUse | None:
    """Return what the tools ask for; None if there are none, or none may be called.

    `answer` is what the request demands of an answer that is no call.
    """
    choice = request.tool_choice or ToolChoice(mode="auto")
    if not request.tools:
        if choice.mode in ("required", "named"):
            raise InvalidRequest("'tool_choice' needs 'tools'.", param="tool_choice")
        return None
    tools = [_plain(tool) for tool in request.tools]
    known = [tool.function.name for tool in request.tools]
    if len(set(known)) < len(known):
        raise InvalidRequest("'tools' has two functions of one name.", param="tools")
    if unknown := [name for name in choice.names if name not in known]:
        raise InvalidRequest(
            f"'tool_choice' names '{unknown[0][:64]}', which is not in 'tools'.",
            param="tool_choice",
        )
    if choice.mode == "none":
        return None
    use = ToolUse(
        format=context.tool_format,
        shown=tools,
        names=frozenset(choice.names or known),
        demand=None,
        is_forced=choice.mode in ("required", "named"),
        is_parallel=request.parallel_tool_calls is not False and choice.mode != "named",
    )
    return replace(use, demand=_demand(use, answer))


def _demand(use: ToolUse, answer: Demand | None) -> Demand | None:
    """Return the grammar of what may be said; none if anything may."""
    if use.is_forced:
        answer = None  # there will be none
    elif answer is None:
        return None
    elif answer[1].kind != "json_schema":
        raise InvalidRequest(f"'{answer[0]}' does not go with 'tools'.", param=answer[0])
    try:
        text = tools_grammar(
            use.format,
            use.shown,
            names=use.names,
            parallel=use.is_parallel,
            answer=None if answer is None else json.loads(answer[1].text),
        )
    except ValueError as error:
        raise InvalidRequest(f"'tools': {error}.", param="tools") from None
    return ("tools", text_spec("lark", text, param="tools"))


def _plain(tool: Tool) -> dict[str, object]:
    """Return a tool as templates and grammars read it."""
    function = tool.function
    plain: dict[str, object] = {"name": function.name}
    if function.description is not None:
        plain["description"] = function.description
    plain["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": plain}
