"""A model's chat template: messages in, segments of text for the tokenizer out.

Owns the Jinja environment, set up as transformers does, in the immutable sandbox. Text from the
request never yields a control token (`app.text.marks`). A template comes from the model or the
operator, never from a request. BOS: as with `apply_chat_template`, what the template writes is
all there is; nothing is put in front.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from app.errors import InvalidRequest
from app.text.marks import AddedTokenSpans, Marks, cut, marked, pick_marks
from app.text.template_limits import MAX_CHARS, LimitedEnvironment
from model.errors import TokenizerError
from model.tokenizer import Tokenizer, UnencodableText

Message = Mapping[str, object]

MAX_RENDERED_CHARS = MAX_CHARS
_MAX_INDENT = 16
_MAX_REASON_CHARS = 300
# What operations on values of the wrong type raise inside a template.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A compiled template; immutable, so that threads may share it."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], added_tokens: Collection[str]
    ) -> None:
        """Compile a template. Raises TokenizerError when it is none."""
        self._source = source
        self.uses_tools = _uses_tools(source)
        self._special_tokens = dict(special_tokens)
        self._spans = AddedTokenSpans(added_tokens)
        try:
            self._environment = _environment()
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            reason = _clean(str(error))
            raise TokenizerError(f"the chat template does not compile: {reason}") from error

    def mentions(self, word: str) -> bool:
        """Say whether a word stands anywhere in the template's source."""
        return word in self._source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        kwargs: Mapping[str, object] | None = None,
        parse_special_content: bool = False,
    ) -> list[tuple[str, bool]]:
        """Return segments for `Tokenizer.encode_segments`. Raises InvalidRequest.

        `kwargs` are further variables of the template. `parse_special_content` lets added tokens
        count in what the request says: only for those who may write any prompt.
        """
        extra = dict(kwargs or {})
        if extra.keys() & {"messages", "tools", "documents", "add_generation_prompt"}:
            raise InvalidRequest("chat_template_kwargs may not replace messages, tools or prompts")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other"
            )
        values = [list(messages), None if tools is None else list(tools), extra]
        marks = pick_marks(values, self._source + "".join(self._special_tokens.values()))
        spans = AddedTokenSpans(()) if parse_special_content else self._spans
        chat, tool_list, variables = (marked(value, spans, marks) for value in values)
        assert isinstance(chat, list)
        assert isinstance(variables, dict)
        if continue_final_message:
            _mark_end(chat, marks)
        names: dict[str, object] = {
            **variables,
            **self._special_tokens,
            "messages": chat,
            "tools": tool_list,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(names, marks)
        if continue_final_message:
            text = _cut_at_end(text, marks)
        return cut(text, marks)

    def _run(self, names: Mapping[str, object], marks: Marks) -> str:
        parts = []
        num_chars = 0
        self._environment.start()
        try:
            for part in self._template.generate(names):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    raise InvalidRequest("the chat template makes too long a prompt of this")
        except _TEMPLATE_FAULTS as error:
            reason = _clean(marks.strip(str(error))) or type(error).__name__
            raise InvalidRequest(f"the chat template refuses these messages: {reason}") from error
        return "".join(parts)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
    kwargs: Mapping[str, object] | None = None,
    parse_special_content: bool = False,
) -> list[int]:
    """Render and encode a conversation; the ids are `apply_chat_template`'s. Raises InvalidRequest.

    BOS stands in front exactly if the template writes it.
    """
    segments = template.render(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=tools,
        kwargs=kwargs,
        parse_special_content=parse_special_content,
    )
    try:
        return tokenizer.encode_segments(segments)
    except UnencodableText as error:
        raise InvalidRequest(f"messages: {error}", param="messages") from error


def end_of_turn_ids(template_source: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the control token that a template puts after what the assistant says, if any.

    Found by rendering a short conversation, so that no list of known templates is needed. Raises
    TokenizerError when the template does not compile.
    """
    template = ChatTemplate(
        template_source, special_tokens=tokenizer.special_token_texts, added_tokens=()
    )
    said = "Certainly42"
    user = {"role": "user", "content": "Question"}
    answer = {"role": "assistant", "content": said}
    for messages in ([user, answer, user], [user, answer]):
        try:
            segments = template.render(messages, add_generation_prompt=False)
        except InvalidRequest:
            continue
        _, _, after = "".join(text for text, _ in segments).rpartition(said)
        after = after.lstrip()
        texts = sorted(tokenizer.added_tokens, key=len, reverse=True)
        first = next((text for text in texts if text.strip() and after.startswith(text)), None)
        if first is not None and tokenizer.added_tokens[first] != tokenizer.bos_token_id:
            return (tokenizer.added_tokens[first],)
    return ()


def _uses_tools(source: str) -> bool:
    """Say whether a template looks at the tools it is given."""
    try:
        tree = _environment().parse(source)
        return "tools" in jinja2.meta.find_undeclared_variables(tree)
    except (jinja2.TemplateError, RecursionError):
        return False  # it does not compile either, which is told then


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what a model is trained on; here its body and nothing more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Spell JSON without HTML's escapes. Private-use characters stay: they may be marks."""
    if indent is not None and indent > _MAX_INDENT:
        raise ValueError("tojson indents by too much")
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _BEYOND_ASCII.sub(_escaped, text) if ensure_ascii else text


_BEYOND_ASCII = re.compile("[^\x00-\x7e\ue000-\uf8ff\U000f0000-\U0010ffff]")


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _mark_end(chat: list[object], marks: Marks) -> None:
    final = chat[-1] if chat else None
    content = final.get("content") if isinstance(final, dict) else None
    if not isinstance(final, dict) or not isinstance(content, str):
        raise InvalidRequest("continue_final_message needs a final message with text")
    # The space shows whether the template trims what a message ends with.
    final["content"] = f"{content}{marks.end} "


def _cut_at_end(text: str, marks: Marks) -> str:
    at = text.rfind(marks.end)
    if at < 0:
        raise InvalidRequest("the chat template leaves out the final message: cannot continue it")
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


def _clean(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _MAX_REASON_CHARS else line[:_MAX_REASON_CHARS] + "…"
