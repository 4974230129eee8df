"""One JSON object that may be a call: {"name": ..., "arguments" or "parameters": {...}}.

Read character by character. Arguments are passed on as they were written, from the moment that
the name is known.
"""

import json
from collections.abc import Callable, Collection

from app.text.tools.reader import MAX_HELD, CallReader, TagScanner

_ARGUMENTS = frozenset({"arguments", "parameters"})
_CLOSERS = {"{": "}", "[": "]"}
MAX_DEPTH = 128


class JsonCall:
    """Feed it from the opening brace on.

    `name` is set once it is known to be one of the functions; `is_broken` once the text cannot
    be a call (any more); `is_done` with the closing brace. `held` is what was read before `name`.
    A character that breaks the call is no part of it, unless it was passed on or held.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        self.held = ""
        self._state: Callable[[str], None] = self._expect_object
        self._key = ""
        self._value: list[str] = []  # of the key or of a value that is kept
        self._closers: list[str] = []
        self._is_string = False
        self._is_escaped = False
        self._keeps_value = False
        self._streams_value = False
        self._ready = ""  # arguments to be passed on
        self._has_arguments = False

    def feed(self, char: str) -> str:
        """Take a character; return the arguments that are known by now and were not before."""
        if self.name is None:
            self.held += char
        self._state(char)
        if self.name is None:
            self.is_broken |= len(self.held) > MAX_HELD
            return ""
        if self.is_done and not self._has_arguments:
            self._ready = "{}"
        ready, self._ready = self._ready, ""
        return ready

    def _expect_object(self, char: str) -> None:
        self._become(self._expect_key) if char == "{" else self._break()

    def _expect_key(self, char: str) -> None:
        if char == '"':
            self._value = ['"']
            self._become(self._read_key)
        elif not char.isspace():
            self._break()

    def _read_key(self, char: str) -> None:
        self._value.append(char)
        if self._ends_string(char):
            self._key = _text_of("".join(self._value))
            self._become(self._expect_colon)

    def _expect_colon(self, char: str) -> None:
        if char == ":":
            self._become(self._expect_value)
        elif not char.isspace():
            self._break()

    def _expect_value(self, char: str) -> None:
        if char.isspace():
            return
        self._value = []
        is_arguments = self._key in _ARGUMENTS and not self._has_arguments
        self._streams_value = is_arguments and char == "{"
        self._keeps_value = (is_arguments or self._key == "name") and not self._streams_value
        self._has_arguments |= self._streams_value
        self._become(self._read_value)
        self._read_value(char)

    def _read_value(self, char: str) -> None:
        if not self._closers and not self._is_string and (char in ",}" or char.isspace()):
            self._end_value()
            self._expect_comma(char)
            return
        self._keep(char)
        if self._is_string:
            if self._ends_string(char):
                self._is_string = False
                self._end_if_whole()
        elif char == '"':
            self._is_string = True
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
            if len(self._closers) > MAX_DEPTH:
                self._break()
        elif char in "}]":
            if not self._closers or self._closers.pop() != char:
                self._break()
            else:
                self._end_if_whole()

    def _end_if_whole(self) -> None:
        if not self._closers:
            self._end_value()

    def _keep(self, char: str) -> None:
        if self._keeps_value:
            self._value.append(char)
        elif self._streams_value:
            self._ready += char

    def _end_value(self) -> None:
        self._become(self._expect_comma)
        if not self._keeps_value:
            return
        self._keeps_value = False
        value = "".join(self._value)
        if self._key == "name":
            name = _text_of(value)
            if self.name is None and name in self._names:
                self.name = name
            elif self.name != name:
                self._break()
        else:  # arguments that are no object: the text of one, nothing, or what was written
            self._has_arguments = True
            text = _text_of(value)
            if text.lstrip().startswith("{"):
                self._ready += text
            else:
                self._ready += "{}" if value in ("", "null", '""') else value

    def _expect_comma(self, char: str) -> None:
        if char == ",":
            self._become(self._expect_key)
        elif char == "}":
            self.is_done = self.name is not None
            if not self.is_done:
                self._break()
        elif not char.isspace():
            self._break()

    def _ends_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
            return False
        self._is_escaped = char == "\\"
        return char == '"'

    @property
    def lacks_only_brace(self) -> bool:
        """Whether name and arguments are complete, and the object's closing brace is missing."""
        at_comma = self._state == self._expect_comma
        return self.name is not None and self._has_arguments and at_comma

    def _become(self, state: Callable[[str], None]) -> None:
        self._state = state

    def _break(self) -> None:
        self.is_broken = True


def _text_of(literal: str) -> str:
    """Return the text of a JSON string; nothing if it is none."""
    try:
        value = json.loads(literal, strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


class JsonCallReader(CallReader):
    """What formats have in common whose calls are such objects.

    `_feed` of a format says where a call may begin; `_head` is what it holds back before one.
    """

    closing_tag = ""  # may stand where a call lacks its last brace: small models forget it

    def __init__(self, names: Collection[str], *tags: str) -> None:
        super().__init__(names)
        self._tags = TagScanner(*tags)
        self._call: JsonCall | None = None
        self._head = ""

    def _begin_call(self, brace: str) -> None:
        self._call = JsonCall(self._names)
        self._read_call(self._call, brace)

    def _read_call(self, call: JsonCall, char: str) -> None:
        was_known = call.name is not None
        arguments = call.feed(char)
        if call.name is not None and not was_known:
            self._head = ""
            self._open_call(call.name)
        self._argue(arguments)
        if call.is_broken:
            self._call = None
            if call.name is None:
                self._say(self._take_head() + call.held[:-1])
            else:
                is_whole = call.lacks_only_brace and char == self.closing_tag[:1]
                self._close_call(is_whole=is_whole)
            if not arguments:
                self._feed(char)  # it may begin a tag
        elif call.is_done:
            self._call = None
            self._close_call()

    def _take_head(self) -> str:
        """Return what stands before something that is no call, and forget it."""
        raise NotImplementedError

    def _end(self) -> None:
        held = self._call.held if self._call is not None and self._call.name is None else ""
        self._say(self._take_head() + held + self._tags.flush())
