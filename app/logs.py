"""The log: a line of text or a JSON object a record, on standard error.

Whoever writes a record may know its request and say so with `extra={"request_id": ...}`. Knows
nothing of servers; what a client sent can neither start a line nor move a cursor.
"""

import atexit
import json
import logging
import os
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


class LineFormatter(logging.Formatter):
    """One line a message, with every character visible; tracebacks follow, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))

    def formatException(self, ei: ExceptionInfo) -> str:
        """Return a traceback, indented: its last line may quote what a client sent."""
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + _printable(line) for line in lines)


def _printable(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class JsonFormatter(logging.Formatter):
    """One object a line, in ASCII: time (UTC), level, logger, message, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if isinstance(request_id, str):
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        # JSON escapes every control character but this one.
        return json.dumps(fields).replace("\x7f", "\\u007f")


def set_up_logging(level: str, log_format: Literal["text", "json"] = "text") -> None:
    """Log to standard error; as JSON, warnings and what ends the process are records as well."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
    logging.basicConfig(level=level.upper(), handlers=[handler])
    atexit.register(_let_go)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _let_go() -> None:
    """Leave nothing in standard error that cannot be written: Python's exit code would be 120."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.getLogger("arriero").critical("the process ends", exc_info=(kind, error, traceback))
