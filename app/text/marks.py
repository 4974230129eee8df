"""Which parts of a request's strings must never become control tokens, carried through a template.

A template is a program that rearranges strings, so what came from the request is marked before
it runs and found again after. Only spans that could be, begin or end an added token are put
between two private-use characters, so that ordinary text reaches the template as it is and its
`trim`, `in` and `split` work; two characters that occur nowhere in the request are picked anew
for each. What is left of a pair that the template tore apart still parts the text there. Out of
reach: a template that rewrites the inside of a string (`replace`, `upper`) into a control token.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.errors import InvalidRequest

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
# Keys and values that templates compare with; as whole words they cannot be control tokens that
# the template did not spell out itself.
_ROLES = frozenset(
    ("system", "user", "assistant", "tool", "developer", "function", "ipython", "text")
)
_WORD = re.compile(r"[\w.-]+", re.ASCII)
MAX_DEPTH = 64


class AddedTokenSpans:
    """Find the spans of a string that added tokens could claim; built once for a tokenizer."""

    def __init__(self, added_tokens: Collection[str]) -> None:
        # Tokens of nothing but white space lay no claim to a role, and every text has them.
        tokens = [token for token in added_tokens if token.strip()]
        self._pattern = re.compile(_longest_first(tokens)) if tokens else None
        self._prefixes = frozenset(token[:n] for token in tokens for n in range(1, len(token)))
        self._suffixes = frozenset(token[n:] for token in tokens for n in range(1, len(token)))
        self._longest = max(map(len, tokens), default=0)
        self._all = "\0".join(tokens)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the spans to protect, in order and apart from each other.

        Whole added tokens; the longest beginning of one at the end of the text, and the longest
        end of one at its start, with and without the white space that a template may trim.
        """
        if self._pattern is None or not text:
            return []
        spans = [match.span() for match in self._pattern.finditer(text)]
        for end in {len(text), len(text.rstrip())}:
            for length in range(min(self._longest - 1, end), 0, -1):
                if text[end - length : end] in self._prefixes:
                    spans.append((end - length, end))
                    break
        for start in {0, len(text) - len(text.lstrip())}:
            for length in range(min(self._longest - 1, len(text) - start), 0, -1):
                if text[start : start + length] in self._suffixes:
                    spans.append((start, start + length))
                    break
        return _merged(spans)

    def is_inside_token(self, text: str) -> bool:
        """Say whether a whole string lies inside an added token."""
        return bool(text) and text in self._all


@dataclass(frozen=True, slots=True)
class Marks:
    """The characters of one rendering: around a protected span, and at the end of a message."""

    open: str
    close: str
    end: str

    def strip(self, text: str) -> str:
        """Return a text without any of them."""
        return text.translate({ord(mark): None for mark in (self.open, self.close, self.end)})


def pick_marks(values: Sequence[object], template: str) -> Marks:
    """Pick three private-use characters that occur in no string given. Raises InvalidRequest."""
    taken = set(template)
    for text in _strings(values, 0):
        if not text.isascii():
            taken.update(text)
    free = (chr(code) for block in _PRIVATE_USE for code in block if chr(code) not in taken)
    marks = [mark for _, mark in zip(range(3), free, strict=False)]
    if len(marks) < 3:
        raise InvalidRequest("the conversation uses up every private-use character of Unicode")
    return Marks(*marks)


def marked(value: object, spans: AddedTokenSpans, marks: Marks, key: str = "") -> object:
    """Return a copy of a value out of a request with the spans in all its strings marked."""
    if isinstance(value, str):
        return _marked_text(value, spans, marks, key)
    if isinstance(value, Mapping):
        return {
            _marked_key(inner, spans, marks): marked(item, spans, marks, str(inner))
            for inner, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [marked(item, spans, marks, key) for item in value]
    return value


def cut(text: str, marks: Marks) -> list[tuple[str, bool]]:
    """Cut a rendered text at its marks into segments with whether added tokens count there.

    A lone mark leaves an empty segment, over which no added token can form. If the opening one is
    left alone, its span was cut short, and the template's text after it may complete the token:
    the first character is protected as well, though it be of a token of the template's own.
    """
    segments: list[tuple[str, bool]] = []
    pieces = re.split(f"([{marks.open}{marks.close}])", text.replace(marks.end, ""))
    is_paired = False  # the mark before this piece closes a span
    for place in range(0, len(pieces), 2):
        piece = pieces[place]
        before = pieces[place - 1] if place else ""
        after = pieces[place + 1] if place + 1 < len(pieces) else ""
        if before == marks.open and after == marks.close:
            segments.append((piece, False))
            is_paired = True
            continue
        guarded = 0
        if before and not is_paired:
            guarded = 1 if before == marks.open else 0
            segments.append((piece[:guarded], False))
        is_paired = False
        if piece[guarded:]:
            segments.append((piece[guarded:], True))
    return segments


def _marked_text(text: str, spans: AddedTokenSpans, marks: Marks, key: str) -> str:
    if key in ("role", "type") and text in _ROLES:
        return text
    found = spans.find(text)
    if not found and key in ("role", "name") and spans.is_inside_token(text):
        found = [(0, len(text))]  # a template may write '<|' + role + '|>'
    if not found:
        return text
    parts = []
    at = 0
    for start, end in found:
        parts += [text[at:start], marks.open, text[start:end], marks.close]
        at = end
    return "".join([*parts, text[at:]])


def _marked_key(key: object, spans: AddedTokenSpans, marks: Marks) -> object:
    if not isinstance(key, str) or _WORD.fullmatch(key):
        return key  # templates look plain keys up
    return _marked_text(key, spans, marks, "")


def _strings(value: object, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"messages and tools may be nested {MAX_DEPTH} levels deep at most")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, depth + 1)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _longest_first(tokens: Collection[str]) -> str:
    """Spell a pattern for the longest of some texts, as a tree, so that no text is slow to match.

    A plain alternation would try hundreds of tokens at each `<|`. The tree branches where sorted
    texts part; those that begin alike share the beginning.
    """

    def branch(texts: list[str]) -> str:
        if len(texts) == 1:
            return re.escape(texts[0])
        shared = _shared_prefix(texts[0], texts[-1])
        rest = [text[len(shared) :] for text in texts]
        is_complete = rest[0] == ""
        groups: dict[str, list[str]] = {}
        for text in rest[is_complete:]:
            groups.setdefault(text[0], []).append(text)
        inner = "|".join(branch(group) for group in groups.values())
        return f"{re.escape(shared)}(?:{inner}){'?' if is_complete else ''}"

    return branch(sorted(set(tokens)))


def _shared_prefix(first: str, last: str) -> str:
    length = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]
