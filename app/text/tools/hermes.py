"""Hermes and ChatML: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, text around it."""

from collections.abc import Collection

from app.text.tools.json_call import JsonCallReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_SPACE = 64  # of an opening tag and the white space behind it


class HermesReader(JsonCallReader):
    """Reads calls between tags; text between an opening tag and what is no call is content."""

    closing_tag = CLOSE

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names, OPEN, CLOSE)
        self._is_open = False  # behind an opening tag

    def _feed(self, char: str) -> None:
        if self._call is not None:
            self._read_call(self._call, char)
        elif self._tags.is_holding:
            self._scan(char)
        elif self._is_open and not self._head and char.isspace():
            return  # behind a call, before its closing tag
        elif self._is_open and char == "{":
            self._begin_call(char)
        elif self._head and char.isspace() and len(self._head) < MAX_SPACE:
            self._head += char
        else:
            self._scan(char)

    def _scan(self, char: str) -> None:
        text, tag = self._tags.push(char)
        if (text or tag) and self._head:
            self._say(self._take_head())  # the tag had nothing to do with a call
        if text:
            self._say(text)
            self._is_open = False
        if tag == OPEN:
            self._head, self._is_open = OPEN, True
        elif tag == CLOSE:
            if not self._is_open:
                self._say(CLOSE)
            self._is_open = False

    def _take_head(self) -> str:
        head, self._head, self._is_open = self._head, "", False
        return head
