"""Text with think tags parted into what a model thinks and what it says.

White space around the tags, up to a bound, is theirs. A text that never closes its tag is all
thought.
"""

from dataclasses import dataclass

from app.text.tools.reader import MAX_HELD, TagScanner

_KNOWN_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"))


@dataclass(frozen=True, slots=True)
class Parted:
    """More of both kinds of text."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Parts a text that comes in pieces, wherever it is cut.

    `starts_inside`: the prompt has opened the tag already. Only a tag before all content counts,
    so that an answer may speak of tags.
    """

    def __init__(self, open_tag: str, close_tag: str, *, starts_inside: bool) -> None:
        self._open, self._close = open_tag, close_tag
        self._tags = TagScanner(open_tag, close_tag)
        self._is_inside = starts_inside
        self._is_over = False  # whatever comes is content
        self._drops_space = starts_inside
        self._space = ""
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def push(self, text: str) -> Parted:
        if self._is_over and not self._drops_space:
            return Parted("", text)
        for place, char in enumerate(text):
            if self._is_over and not self._drops_space:
                self._content.append(self._space + text[place:])
                self._space = ""
                break
            self._feed(char)
        return self._take()

    def finish(self) -> Parted:
        """Return what was held back."""
        self._say(self._tags.flush())
        if not self._is_inside:
            self._content.append(self._space)
        return self._take()

    def _feed(self, char: str) -> None:
        if self._is_over:
            self._say(char)
            return
        text, tag = self._tags.push(char)
        if text:
            self._say(text)
        if tag == self._open and not self._is_inside:
            self._is_inside, self._drops_space, self._space = True, True, ""
        elif tag == self._close and self._is_inside:
            self._is_inside, self._is_over = False, True
            self._drops_space, self._space = True, ""
        elif tag is not None:
            self._say(tag)

    def _say(self, text: str) -> None:
        """Take text, holding back white space until something follows it."""
        for char in text:
            if char.isspace():
                if not self._drops_space:
                    self._hold_space(char)
                continue
            self._drops_space = False
            if not self._is_inside:
                self._is_over = True  # content has begun without a thought before it
            target = self._reasoning if self._is_inside else self._content
            target.append(self._space + char)
            self._space = ""

    def _hold_space(self, char: str) -> None:
        self._space += char
        if len(self._space) > MAX_HELD:  # more than belongs to a tag
            self._is_over |= not self._is_inside
            (self._reasoning if self._is_inside else self._content).append(self._space)
            self._space = ""

    def _take(self) -> Parted:
        if self._is_over and self._space:
            self._content.append(self._space)
            self._space = ""
        parted = Parted("".join(self._reasoning), "".join(self._content))
        self._reasoning.clear()
        self._content.clear()
        return parted


def detect_think_tags(template_source: str | None) -> tuple[str, str] | None:
    """Return the tags around thoughts if a template knows of any."""
    source = template_source or ""
    return next((tags for tags in _KNOWN_TAGS if tags[1] in source), None)
