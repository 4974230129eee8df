"""Llama 3.2 and 4: [name(key="value", other=[1, 2]), second()], arguments turned into JSON.

Python's literals are read by a state machine of their own, nothing is evaluated. JSON's true,
false and null count as well.
"""

import json
import string
import sys
from collections.abc import Callable, Collection

from app.text.tools.reader import MAX_HELD, CallReader, TagScanner

START, END, TAG = "<|python_start|>", "<|python_end|>", "<|python_tag|>"
MAX_DEPTH = 64
MAX_KEY = 256
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_SIMPLE_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v",
                   "0": "\0", "\\": "\\", "'": "'", '"': '"', "\n": ""}  # fmt: skip
_OF_NUMBERS = frozenset(string.digits + "+-.eE")
_NUMBERED_ESCAPES = {"x": 2, "u": 4, "U": 8}


class Literal:
    """Translates one Python literal into compact JSON, character by character.

    `feed` returns what is known of the translation; `is_done` once the character given is the
    first that is no part of it, `is_broken` once there is no such literal.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._closers: list[str] = []
        self._is_at_value: list[bool] = []  # in each bracket: no key is expected
        self._is_text = False  # the last value is a string
        self._quote = ""
        self._escape = ""
        self._word = ""
        self._comma = ""  # held back: Python allows one before a closing bracket
        self._has_value = False

    def feed(self, char: str) -> str:
        if self._quote:
            return self._read_string(char)
        if char.isalnum() or char in "+-._":
            self.is_broken |= len(self._word) >= MAX_HELD or self._has_value
            self._word += "" if self.is_broken else char
            return ""
        return self._end_word() + self._read_mark(char)

    def flush(self) -> str:
        """Return what was held back, as far as it is known what it stands for."""
        word = self._word
        text = self._end_word()
        return word if self.is_broken else text

    @property
    def held(self) -> str:
        """What was read and has not been translated."""
        return self._word + self._escape

    def _read_mark(self, char: str) -> str:
        if self.is_broken or char.isspace():
            return ""
        self.is_broken |= self._has_value and (char in "'\"" or char in _CLOSERS)
        self.is_broken |= char in _CLOSERS and len(self._closers) >= MAX_DEPTH
        if self.is_broken:
            return ""
        if char in "'\"":
            before = self._before_value()
            self._quote, self._is_text = char, True
            return before + '"'
        if char in _CLOSERS:
            before = self._before_value()
            self._closers.append(_CLOSERS[char])
            self._is_at_value.append(char != "{")
            self._has_value = False
            return before + ("[" if char == "(" else char)
        if not self._closers:
            self.is_done, self.is_broken = self._has_value, not self._has_value
            return ""
        if char in "])}":
            closer, was_value = self._closers.pop(), self._is_at_value.pop()
            if char != closer or (self._has_value and not was_value):
                self.is_broken = True
                return ""
            self._comma, self._has_value, self._is_text = "", True, False
            return "]" if closer == ")" else closer
        if char == "," and self._has_value and self._is_at_value[-1]:
            self._comma, self._has_value = ",", False
            self._is_at_value[-1] = self._closers[-1] != "}"
            return ""
        if char == ":" and self._has_value and self._is_text and not self._is_at_value[-1]:
            self._is_at_value[-1], self._has_value = True, False
            return ":"
        self.is_broken = True
        return ""

    def _before_value(self) -> str:
        comma, self._comma = self._comma, ""
        self._has_value, self._is_text = True, False
        return comma

    def _end_word(self) -> str:
        if not self._word:
            return ""
        word = _CONSTANTS.get(self._word, self._word)
        if word not in ("true", "false", "null"):
            word = _number(word)
        if not word:
            self.is_broken = True
            return ""
        self._word = ""
        return self._before_value() + word

    def _read_string(self, char: str) -> str:
        if self._escape:
            return self._read_escape(char)
        if char == "\\":
            self._escape = char
            return ""
        if char == self._quote:
            self._quote = ""
            return '"'
        return json.dumps(char, ensure_ascii=False)[1:-1]

    def _read_escape(self, char: str) -> str:
        kind = self._escape[1:2]
        if not kind and char not in _NUMBERED_ESCAPES:
            self._escape = ""
            text = _SIMPLE_ESCAPES.get(char, "\\" + char)
            return json.dumps(text, ensure_ascii=False)[1:-1]
        if kind and char not in string.hexdigits:
            self.is_broken = True
            return ""
        self._escape += char
        if kind and len(self._escape) == 2 + _NUMBERED_ESCAPES[kind]:
            code = int(self._escape[2:], 16)
            if code > sys.maxunicode:
                self._escape = self._escape[:-1]
                self.is_broken = True
                return ""
            self._escape = ""
            return json.dumps(chr(code))[1:-1]
        return ""


class PythonicReader(CallReader):
    """Reads a list of calls at the start of the text or behind a start tag."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._tags = TagScanner(START, END, TAG)
        self._may_begin = True
        self._head = ""
        self._state: Callable[[str], None] | None = None  # inside of a list
        self._name = ""
        self._key = ""
        self._literal: Literal | None = None
        self._is_called = False  # the call has been told of
        self._has_arguments = False

    def _feed(self, char: str) -> None:
        if self._state is not None:
            self._head += "" if self._is_called else char
            self._state(char)
            if len(self._head) > MAX_HELD:
                self._reject("")
        elif self._tags.is_holding:
            self._scan(char)
        elif self._may_begin and char == "[":
            self._head += char
            self._state = self._expect_name
        elif self._may_begin and char.isspace() and len(self._head) < 64:
            self._head += char
        else:
            self._scan(char)

    def _scan(self, char: str) -> None:
        text, tag = self._tags.push(char)
        if text or tag:
            head, self._head = self._head, ""
            self._say(head + text)
            self._may_begin = False
        if tag == END and self._is_after_call:
            return
        if tag:
            self._may_begin, self._head = True, tag

    # Inside of a list

    def _expect_name(self, char: str) -> None:
        if char.isalnum() or char in "_.-":
            self._name += char
        elif char == "(" and self._name in self._names:
            self._state = self._expect_key
        elif not (char.isspace() and not self._name):
            self._reject(char)

    def _expect_key(self, char: str) -> None:
        if is_of_key(char) and len(self._key) < MAX_KEY:
            self._key += char
        elif char == "=" and self._key:
            self._expect_equals(char)
        elif char == ")" and not self._key:
            self._end_call()
        elif char.isspace():
            if self._key:
                self._state = self._expect_equals
        else:
            self._reject(char)

    def _expect_equals(self, char: str) -> None:
        if char == "=":
            self._begin_call()
            self._argue(("," if self._has_arguments else "{") + json.dumps(self._key) + ":")
            self._key, self._has_arguments = "", True
            self._literal = Literal()
            self._state = self._read_value
        elif not char.isspace():
            self._reject(char)

    def _read_value(self, char: str) -> None:
        literal = self._literal
        assert literal is not None
        text = literal.feed(char)
        self._argue(text)
        if literal.is_broken:
            self._reject(char)
            return
        if literal.is_done:
            self._literal = None
            if char == ",":
                self._state = self._expect_key
            elif char == ")":
                self._end_call()
            else:
                self._reject(char)

    def _expect_comma(self, char: str) -> None:
        if char == ",":
            self._state, self._head = self._expect_name, ""
        elif char == "]":
            self._state, self._may_begin, self._head = None, False, ""
        elif not char.isspace():
            self._reject(char)

    def _begin_call(self) -> None:
        if not self._is_called:
            self._is_called, self._head = True, ""
            self._open_call(self._name)

    def _end_call(self) -> None:
        self._begin_call()
        self._argue("}" if self._has_arguments else "{}")
        self._close_call()
        self._name, self._is_called, self._has_arguments = "", False, False
        self._state = self._expect_comma

    def _reject(self, char: str) -> None:
        """Take what was held as content; a call that has begun stays as far as it came.

        The character that breaks the list off may begin a tag.
        """
        if self._is_called:
            self._close_call(is_whole=False)
            head = self._key + (self._literal.held if self._literal is not None else "")
        else:
            head, self._head = self._head[: len(self._head) - len(char)], ""
        self._state, self._literal, self._may_begin = None, None, False
        self._name, self._key, self._is_called = "", "", False
        self._has_arguments = False
        self._say(head)
        if char:
            self._scan(char)

    def _end(self) -> None:
        if self._literal is not None:
            self._argue(self._literal.flush())
        self._say(self._head + self._tags.flush())


def is_of_key(char: str) -> bool:
    """Say whether a keyword may hold a character: JSON schemas name things as Python cannot."""
    return char.isalnum() or char in "_-.$@"


def _number(word: str) -> str:
    """Return a Python number as JSON has it; nothing if it is none."""
    text = word.replace("_", "").lstrip("+")
    if not set(text) <= _OF_NUMBERS:
        return ""
    try:
        json.loads(text)
    except ValueError:
        try:
            value = float(text)  # 1. and .5
        except ValueError:
            return ""
        return repr(value) if abs(value) < float("inf") else ""
    return text
