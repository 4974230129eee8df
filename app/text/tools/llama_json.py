"""Llama 3.x: {"name": ..., "parameters": {...}} as the whole answer, or behind <|python_tag|>.

Several calls follow each other after ";", a comma or a line break, or in a list.
"""

from collections.abc import Collection

from app.text.tools.json_call import JsonCall
from app.text.tools.reader import CallReader, TagScanner

TAG = "<|python_tag|>"
_BETWEEN = frozenset(";,[]")


class LlamaJsonReader(CallReader):
    """Reads calls where one may begin: at the start, behind the tag and behind another call."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._tags = TagScanner(TAG)
        self._call: JsonCall | None = None
        self._may_begin = True
        self._head = ""  # what stands before a call that may begin

    def _feed(self, char: str) -> None:
        if self._call is not None:
            self._read_call(self._call, char)
        elif self._tags.is_holding:
            self._scan(char)
        elif self._may_begin and char == "{":
            self._call = JsonCall(self._names)
            self._read_call(self._call, char)
        elif self._may_begin and (char.isspace() or char in _BETWEEN) and len(self._head) < 64:
            self._head += char
        else:
            self._scan(char)

    def _scan(self, char: str) -> None:
        text, tag = self._tags.push(char)
        if text or tag:
            self._say(self._take_head() + text)
            self._may_begin = False
        if tag:
            self._may_begin, self._head = True, tag

    def _read_call(self, call: JsonCall, char: str) -> None:
        was_known = call.name is not None
        arguments = call.feed(char)
        if call.name is not None and not was_known:
            self._head = ""
            self._open_call(call.name)
        self._argue(arguments)
        if call.is_broken:
            self._call, self._may_begin = None, False
            if call.name is None:
                self._say(self._take_head() + call.held[:-1])
            else:
                self._close_call(is_whole=False)
            if not arguments:
                self._feed(char)  # it may begin a tag
        elif call.is_done:
            self._call, self._may_begin = None, True
            self._close_call()

    def _end(self) -> None:
        held = self._call.held if self._call is not None and self._call.name is None else ""
        self._say(self._take_head() + held + self._tags.flush())

    def _take_head(self) -> str:
        """Return what stands before something that is no call, less what ends or parts calls."""
        head, self._head = self._head, ""
        return head.lstrip(";,] \n\t") if self._is_after_call else head
