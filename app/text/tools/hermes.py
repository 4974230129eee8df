"""Hermes and ChatML: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, text around it."""

from collections.abc import Collection

from app.text.tools.json_call import JsonCall
from app.text.tools.reader import CallReader, TagScanner

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_SPACE = 64  # of an opening tag and the white space behind it


class HermesReader(CallReader):
    """Reads calls between tags; text between an opening tag and what is no call is content."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._tags = TagScanner(OPEN, CLOSE)
        self._call: JsonCall | None = None
        self._head = ""  # the opening tag and white space, until a call is certain
        self._is_open = False  # behind an opening tag

    def _feed(self, char: str) -> None:
        if self._call is not None:
            self._read_call(self._call, char)
        elif self._tags.is_holding:
            self._scan(char)
        elif self._is_open and not self._head and char.isspace():
            return  # behind a call, before its closing tag
        elif self._is_open and char == "{":
            self._call = JsonCall(self._names)
            self._read_call(self._call, char)
        elif self._head and char.isspace() and len(self._head) < MAX_SPACE:
            self._head += char
        else:
            self._scan(char)

    def _scan(self, char: str) -> None:
        text, tag = self._tags.push(char)
        if (text or tag) and self._head:
            self._say(self._head)  # the tag had nothing to do with a call
            self._head, self._is_open = "", False
        if text:
            self._say(text)
            self._is_open = False
        if tag == OPEN:
            self._head, self._is_open = OPEN, True
        elif tag == CLOSE:
            if not self._is_open:
                self._say(CLOSE)
            self._is_open = False

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
                head, self._head, self._is_open = self._head, "", False
                self._say(head + call.held[:-1])
            else:  # small models forget the outer brace
                self._close_call(is_whole=call.lacks_only_brace and char == CLOSE[0])
            if not arguments:
                self._feed(char)  # it may begin a tag
        elif call.is_done:
            self._call = None
            self._close_call()

    def _end(self) -> None:
        held = self._call.held if self._call is not None and self._call.name is None else ""
        self._say(self._head + held + self._tags.flush())
