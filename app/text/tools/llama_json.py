"""Llama 3.x: {"name": ..., "parameters": {...}} as the whole answer, or behind <|python_tag|>.

Several calls follow each other after ";", a comma or a line break, or in a list.
"""

from collections.abc import Collection

from app.text.tools.json_call import JsonCallReader

TAG = "<|python_tag|>"
_BETWEEN = frozenset(";,[]")


class LlamaJsonReader(JsonCallReader):
    """Reads calls where one may begin: at the start, behind the tag and behind another call."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names, TAG)
        self._may_begin = True

    def _feed(self, char: str) -> None:
        if self._call is not None:
            self._read_call(self._call, char)
        elif self._tags.is_holding:
            self._scan(char)
        elif self._may_begin and char == "{":
            self._may_begin = False
            self._begin_call(char)
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

    def _close_call(self, *, is_whole: bool = True) -> None:
        super()._close_call(is_whole=is_whole)
        self._may_begin = is_whole

    def _take_head(self) -> str:
        # What ends or parts calls is no content.
        head, self._head = self._head, ""
        return head.lstrip(";,] \n\t") if self._is_after_call else head
