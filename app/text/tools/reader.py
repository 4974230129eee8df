"""What the readers of all formats share: events gathered, white space around calls dropped, tags.

White space that stands between content and a call, or between calls, belongs to the format; all
other text that is no call is content, and nothing is lost. Characters are taken one by one, so
that where a text was split cannot matter, and each is looked at twice at most. What is held back,
white space too, is bounded by `MAX_HELD`.
"""

from collections.abc import Collection
from itertools import groupby

from app.text.tools.events import CallArguments, CallEnd, CallStart, Content, ToolEvent

MAX_HELD = 4096  # characters that may yet turn out to begin a call


class CallReader:
    """Base of the readers: a subclass gets characters and says what they are."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._events: list[ToolEvent] = []
        self._space = ""  # white space of which it is not yet known what it separates
        self._num_calls = 0
        self._is_after_call = False

    def push(self, text: str) -> list[ToolEvent]:
        """Take more text; return what it shows."""
        for char in text:
            self._feed(char)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        """Return what was held back: no more text will come."""
        self._end()
        if not self._is_after_call:
            self._add_content(self._space)
        self._space = ""
        return self._take()

    def _feed(self, char: str) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    # For subclasses

    def _say(self, text: str) -> None:
        """Take text as content."""
        kept = text.rstrip()
        if not kept:
            self._hold_space(text)
            return
        if not self._is_after_call:
            self._add_content(self._space)
        else:
            kept = kept.lstrip()
        self._is_after_call = False
        self._add_content(kept)
        self._space = text[len(text.rstrip()) :]

    def _hold_space(self, text: str) -> None:
        if self._is_after_call:
            return  # belongs to the call, whatever follows
        self._space += text
        if len(self._space) > MAX_HELD:
            self._add_content(self._space)
            self._space = ""

    def _open_call(self, name: str) -> None:
        self._space = ""
        self._events.append(CallStart(self._num_calls, name))

    def _argue(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._num_calls, text))

    def _close_call(self, *, is_whole: bool = True) -> None:
        """End a call; one that broke off has no end to tell of."""
        if is_whole:
            self._events.append(CallEnd(self._num_calls))
        self._num_calls += 1
        self._is_after_call = True

    def _add_content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _take(self) -> list[ToolEvent]:
        """Return the events so far, those of a kind that follow each other joined."""
        merged: list[ToolEvent] = []
        for kind, group in groupby(self._events, key=_kind):
            events = list(group)
            texts = "".join(e.text for e in events if isinstance(e, Content | CallArguments))
            if kind is Content:
                merged.append(Content(texts))
            elif isinstance(events[0], CallArguments):
                merged.append(CallArguments(events[0].index, texts))
            else:
                merged += events
        self._events = []
        return merged


def _kind(event: ToolEvent) -> object:
    return type(event)


class TagScanner:
    """Finds fixed tags in characters that come one by one; holds back what may begin one."""

    def __init__(self, *tags: str) -> None:
        self._tags = tags
        self._held = ""

    def push(self, char: str) -> tuple[str, str | None]:
        """Return text that is part of no tag, and the tag that the character completes."""
        self._held += char
        if self._held in self._tags:
            tag, self._held = self._held, ""
            return "", tag
        free = ""
        while self._held and not any(tag.startswith(self._held) for tag in self._tags):
            free += self._held[0]
            self._held = self._held[1:]
        return free, None

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held
