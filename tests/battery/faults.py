"""A runner, a scheduler and a tokenizer that break when a prompt tells them to.

They stand in front of real ones. What they raise holds a path, an address and a key, so that an
answer that quotes an exception is noticed.
"""

import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from app.engine.scheduler import ScheduledStep, Scheduler
from model.step import (
    FillMasks,
    RowResult,
    Runner,
    RunnerLimits,
    StepHandle,
    StepPlan,
    StepResult,
)

INNER = "at 0x7f3a5c0de000 in /usr/lib/python3/site-packages/inner.py, key hidden-in-the-fault"
DAY_S = 86_400.0


class Clock:
    """`time.time` with a leap in it."""

    def __init__(self) -> None:
        self._time = time.time
        self.leap_s = 0.0

    def __call__(self) -> float:
        return self._time() + self.leap_s


class FaultyTokenizer:
    """Breaks on a text that asks for it, and on one id once `breaks_at` names it."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.breaks_at: int | None = None

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def encode(self, text: str, **options) -> list[int]:
        if "fault:encode" in text:
            raise RuntimeError(f"tokenizer {INNER}")
        return self._inner.encode(text, **options)

    def token_bytes(self, token_id: int) -> bytes:
        self._check(token_id)
        return self._inner.token_bytes(token_id)

    def whole_text(self, token_id: int) -> str | None:
        self._check(token_id)
        return self._inner.whole_text(token_id)

    def _check(self, token_id: int) -> None:
        if token_id == self.breaks_at:
            raise RuntimeError(f"detokenizer {INNER}")


class FaultyNetwork:
    """Gives out hidden states that are not finite for the rows that it is told."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.poisoned: list[int] = []  # places among a step's rows

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def forward(self, inputs) -> torch.Tensor:
        hidden = self._inner.forward(inputs)
        for place in self.poisoned:
            hidden[inputs.query_starts[place] : inputs.query_starts[place + 1]] = float("nan")
        return hidden


class FaultyRunner:
    """Does what the inner runner does, unless a sequence of the step asks for a fault.

    `fault:raise` always; `fault:once`, `fault:prefill` and `fault:decode` (the device is out of
    memory) for the first step of that kind; `fault:nan`; `fault:hang`; `fault:lost` (no step
    succeeds ever after); `fault:die` (the thread ends); `fault:day+`, `fault:day-`, `fault:day0`
    (the wall clock leaps); `fault:id=N` (that id can't be turned into text any more); `fault:told`
    (the row's error, which clients are told, quotes an exception); `fault:wrong` (from now on each
    token is another); `fault:leak=file`, `=thread`, `=child`, `=memory` (for good); `fault:heal`.
    """

    def __init__(self, inner: Runner, text_of: Callable[[tuple[int, ...]], str]) -> None:
        self._inner = inner
        self._text_of = text_of
        self._wanted: dict[int, tuple[str, str]] = {}  # row -> fault, the text that asks for it
        self._had: set[str] = set()
        self._is_lost = self._is_wrong = False
        self._leaks: list[object] = []
        self.clock = Clock()
        self.tokenizer = SimpleNamespace(breaks_at=None)
        self._network = None
        if hasattr(inner, "_network"):
            self._network = inner._network = FaultyNetwork(inner._network)

    @property
    def limits(self) -> RunnerLimits:
        return self._inner.limits

    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        for row in plan.removed:
            self._wanted.pop(row, None)
        for new in plan.added:
            text = self._text_of(new.token_ids[: new.num_prompt_tokens])
            if "fault:" in text:
                fault = text.partition("fault:")[2].split()[0]
                self._wanted[new.row] = fault, text
        poisoned = []
        for place, row in enumerate(plan.rows):
            if row.row in self._wanted:
                fault, text = self._wanted[row.row]
                if fault == "nan":
                    poisoned.append(place)
                self._break(fault, text, is_prefill=row.start == 0)
        if self._is_lost:
            raise RuntimeError(f"device lost {INNER}")
        if self._network is not None:
            self._network.poisoned = poisoned
        return self._inner.launch(plan, fill_masks)

    def collect(self, handle: StepHandle) -> StepResult:
        result = self._inner.collect(handle)
        return dataclasses.replace(result, rows=tuple(map(self._distort, result.rows)))

    def _distort(self, row: RowResult) -> RowResult:
        if self._wanted.get(row.row, ("",))[0] == "told":
            return RowResult(row=row.row, error=f"Traceback (most recent call last): {INNER}")
        if self._is_wrong:
            wrong = tuple(max(0, token_id - 1) for token_id in row.token_ids)
            return dataclasses.replace(row, token_ids=wrong)
        return row

    def _break(self, fault: str, text: str, *, is_prefill: bool) -> None:
        is_first = text not in self._had
        if fault == "raise":
            raise RuntimeError(f"broken {INNER}")
        if fault == "once" and is_first:
            self._had.add(text)
            raise RuntimeError(f"transient {INNER}")
        if is_first and fault == ("prefill" if is_prefill else "decode"):
            self._had.add(text)
            raise torch.OutOfMemoryError(f"out of memory {INNER}")
        if fault == "hang":
            threading.Event().wait()
        if fault == "die":
            raise SystemExit
        if fault.startswith("day"):
            self.clock.leap_s = {"+": DAY_S, "-": -DAY_S, "0": 0.0}[fault[3]]
        if fault.startswith("id="):
            number = int(fault[3:])
            self.tokenizer.breaks_at = number if number >= 0 else None
        if is_first and fault.startswith("leak=") and fault != "leak=block":
            self._had.add(text)
            self._leaks.append(leak(fault.removeprefix("leak=")))
        self._is_lost |= fault == "lost"
        self._is_wrong = fault == "wrong" or (self._is_wrong and fault != "heal")


def leak(kind: str) -> object:
    """Take something that is given back when the result is forgotten, and not before."""
    if kind == "file":
        return open(os.devnull)
    if kind == "thread":
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        return thread
    if kind == "child":
        return subprocess.Popen(["sleep", "60"])  # long enough to be seen
    assert kind == "memory"
    return bytearray(os.urandom(1 << 20) * 100)


class BuggyScheduler(Scheduler):
    """Breaks in the middle of its work: once for each request that asks, or as long as it does.

    `fault:leak=block` has it lose a block for good.
    """

    text_of: Callable[[tuple[int, ...]], str]
    had: set[str]

    def schedule(self) -> ScheduledStep | None:
        for sequence in self.running:
            text = self.text_of(tuple(sequence.token_ids[: sequence.num_prompt_tokens]))
            if "fault:bugs" in text or ("fault:bug" in text and text not in self.had):
                self.had.add(text)
                self.running.clear()
                raise KeyError(f"a bug {INNER}")
            if "fault:leak=block" in text and text not in self.had:
                self.had.add(text)
                self.allocator.allocate(1)
        return super().schedule()
