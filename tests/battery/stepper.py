"""A whole server on a socket whose engine's steps a test lets go one by one, and looks at."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import app.engine.engine as engine_module
from app.engine.engine import Engine, EngineOptions
from app.engine.loop import Finish, Inbox, Message
from model.step import StepPlan
from tests.api.wire import Wire, post, wire_server
from tests.engine.drive import make_limits
from tests.fake_engine import VOCAB
from tests.fake_runner import FakeRunner

PATIENCE_S = 20.0
BUDGET = 16  # tokens a step
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What a step computes, and what the engine holds when it is launched."""

    computed: frozenset[Prompt]
    num_rows: int
    held: frozenset[Prompt]  # running or waiting
    num_stray_blocks: int  # neither free nor of a running sequence


class Stepper:
    """Holds every step at its launch until it is let go."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_let = 0
        self._is_open = True
        self.engine: Engine
        self.steps: list[Step] = []

    def __call__(self, plan: StepPlan) -> None:
        with self._changed:
            self.steps.append(self._look(plan))
            number = len(self.steps)
            self._changed.notify_all()
            assert self._changed.wait_for(
                lambda: self._is_open or number <= self._num_let, PATIENCE_S
            )

    def _look(self, plan: StepPlan) -> Step:
        """Look at the scheduler; this is its own thread."""
        scheduler = self.engine._step_loop.scheduler
        prompts = {
            sequence: tuple(sequence.token_ids[: sequence.num_prompt_tokens])
            for sequence in (*scheduler.running, *scheduler.waiting)
        }
        rows = {row.row for row in plan.rows}
        blocks = {id(block) for sequence in prompts for block in sequence.blocks}
        allocator = scheduler.allocator
        return Step(
            computed=frozenset(p for sequence, p in prompts.items() if sequence.row in rows),
            num_rows=len(rows),
            held=frozenset(prompts.values()),
            num_stray_blocks=allocator.num_blocks - allocator.num_free - len(blocks),
        )

    def num_steps_of(self, prompt: Prompt) -> int:
        return sum(prompt in step.computed for step in self.steps)

    def hold(self) -> None:
        """Hold the next step."""
        with self._changed:
            self._is_open, self._num_let = False, len(self.steps)

    def hold_at(self, prompt: Prompt, number: int) -> None:
        """Let steps go until the n-th of a prompt is held at its launch."""
        with self._changed:
            while self.num_steps_of(prompt) < number:
                num_seen = len(self.steps)
                self._num_let = num_seen
                self._changed.notify_all()
                assert self._changed.wait_for(lambda n=num_seen: len(self.steps) > n, PATIENCE_S)

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


class WatchedInbox(Inbox):
    """Says when a message has come that ends a request."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[Finish] = []
        self.is_told = threading.Event()

    def put(self, message: Message) -> None:
        super().put(message)
        if isinstance(message, Finish):
            self.ends.append(message)
            self.is_told.set()


@contextlib.contextmanager
def stepped(
    monkeypatch, *, edges: Mapping[str, object] = MappingProxyType({}), **limits: int
) -> Iterator[tuple[Wire, Stepper, WatchedInbox]]:
    """A server whose steps can be held; `edges` are options of `wire_server`."""
    monkeypatch.setattr(engine_module, "Inbox", WatchedInbox)
    sizes = {"max_num_batched_tokens": BUDGET, "max_model_len": 128, "num_blocks": 128}
    stepper = Stepper()
    runner = FakeRunner(make_limits(vocab_size=VOCAB, **{**sizes, **limits}), on_launch=stepper)
    stepper.engine = Engine(runner, EngineOptions(enable_prefix_caching=False))
    with wire_server(stepper.engine, **edges) as wire:
        try:
            yield wire, stepper, stepper.engine._inbox
            assert wire.is_well()
        finally:
            stepper.open()


def request(
    prompt: Prompt, max_tokens: int, headers: Sequence[bytes] = (), **fields: object
) -> bytes:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    body |= {"seed": 4, "return_token_ids": True, **fields}
    return post(json.dumps(body).encode(), b"connection: close", *headers)


def token_ids(answer: bytes) -> list[int]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["token_ids"]


def wait_for_requests(stepper: Stepper, number: int) -> None:
    """Wait until the engine has been given so many."""
    wait_until(lambda: len(stepper.engine._streams) >= number)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is so, bounded by the tests' patience."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it has not come to be so")
