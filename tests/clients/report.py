"""How a file of checks is run and what it tells: a line of JSON a check on its standard output.

Knows no client library and nothing of the project: it runs in the environment of each client.
"""

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server under test."""

    url: str  # without /v1
    model: str
    key: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


def run(checks: list[Callable[[Target], object]]) -> None:
    """Run every check, whatever became of those before; its docstring's first line is its name."""
    target = Target(url=sys.argv[1], model=sys.argv[2], key=sys.argv[3])
    for check in checks:
        name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
        reason = None
        try:
            result = check(target)
            if inspect.isawaitable(result):
                asyncio.run(_of(result))
        except Exception as error:
            traceback.print_exc()
            at = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(at) if "check_" in f.filename), None)
            reason = f"line {line}: {type(error).__name__}: {error}"
        sys.stdout.write(json.dumps({"check": name, "reason": reason}) + "\n")
        sys.stdout.flush()


async def _of(awaitable: object) -> object:
    return await awaitable  # type: ignore[misc]


def expect(truth: object, what: object = "") -> None:
    """Raise unless `truth` holds: an assert that says what it saw."""
    if not truth:
        raise AssertionError(str(what))


def raised(kind: type[Exception], call: Callable[[], object]) -> Exception:
    """Return the exception that a call must raise."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {answer!r}")
