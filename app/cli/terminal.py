"""What stands between texts and a terminal: no text moves a cursor, and keys typed early are kept.

Knows nothing of models or servers.
"""

import contextlib
import os
import re
import sys
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable, Iterator

# All control characters but tab and new line: an escape sequence could rewrite what was shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """Return a text as standard output takes it: a terminal without control characters."""
    if not sys.stdout.isatty():
        return text
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class Keyboard:
    """Lines from standard input: at the prompt, and typed ahead while an answer is written."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdin.isatty()
        self._early: deque[str] = deque()
        if self._is_terminal:
            with contextlib.suppress(ImportError):  # not everywhere: lines go unedited then
                import readline  # noqa: F401

    def line(self) -> str:
        """Return the next line. Raises EOFError and KeyboardInterrupt."""
        if self._early:
            return self._early.popleft()
        return input("> " if self._is_terminal else "")

    @contextlib.contextmanager
    def watch(self, stop: Callable[[], None]) -> Iterator[None]:
        """While a stream runs, call `stop` for a line `/stop`, and keep other lines."""
        if not self._is_terminal:
            yield
            return
        descriptor = sys.stdin.fileno()

        def read() -> None:
            for line in os.read(descriptor, 65536).decode("utf-8", "replace").splitlines():
                if line.strip() == "/stop":
                    stop()
                elif line.strip():
                    self._early.append(line)

        loop = get_running_loop()
        loop.add_reader(descriptor, read)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
