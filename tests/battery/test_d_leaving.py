"""Group D, leaving: how many steps a request may still take once its client has gone.

A whole server on a socket, its engine over a runner whose steps a test lets go one by one: what is
counted are steps, and no clock is asked. That the same holds of the shared server under load is in
test_d_load.py.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import app.engine.engine as engine_module
from app.engine.engine import Engine, EngineOptions
from app.engine.loop import Finish, Inbox, Message
from model.step import StepPlan
from tests.api.wire import Wire, post, read_all, wire_server
from tests.engine.drive import make_limits
from tests.fake_engine import VOCAB
from tests.fake_runner import FakeRunner

PATIENCE_S = 20.0
BUDGET = 16  # tokens a step
WITNESS = (9, 8, 7)
LEAVER = (5,) * 40
NUM_TOKENS = 8
# With the witness's token a step, the leaver's prompt takes three steps (15 + 15 + 10), the last
# of which samples its first token.
MOMENTS = {  # the step of the leaver's that is under way when its client goes; 0: it still waits
    "queued": 0,
    "its prompt begun": 1,
    "mid prefill": 2,
    "before the first token": 3,
    "mid stream": 6,
    "at the last token": 3 + NUM_TOKENS - 1,
}


@dataclass(frozen=True)
class Step:
    """What a step computes, and what the engine holds when it is launched."""

    computed: frozenset[tuple[int, ...]]  # prompts
    held: frozenset[tuple[int, ...]]  # running or waiting
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
            held=frozenset(prompts.values()),
            num_stray_blocks=allocator.num_blocks - allocator.num_free - len(blocks),
        )

    def num_steps_of(self, prompt: tuple[int, ...]) -> int:
        return sum(prompt in step.computed for step in self.steps)

    def hold(self) -> None:
        """Hold the next step."""
        with self._changed:
            self._is_open, self._num_let = False, len(self.steps)

    def hold_at(self, prompt: tuple[int, ...], number: int) -> None:
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
def stepped(monkeypatch, **limits: int) -> Iterator[tuple[Wire, Stepper, WatchedInbox]]:
    """A server whose steps can be held."""
    monkeypatch.setattr(engine_module, "Inbox", WatchedInbox)
    sizes = {"max_num_batched_tokens": BUDGET, "max_model_len": 128, "num_blocks": 128}
    stepper = Stepper()
    runner = FakeRunner(make_limits(vocab_size=VOCAB, **{**sizes, **limits}), on_launch=stepper)
    stepper.engine = Engine(runner, EngineOptions(enable_prefix_caching=False))
    with wire_server(stepper.engine) as wire:
        try:
            yield wire, stepper, stepper.engine._inbox
            assert wire.is_well()
        finally:
            stepper.open()


def request(prompt: tuple[int, ...], max_tokens: int, **fields: object) -> bytes:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    body |= {"seed": 4, "return_token_ids": True, **fields}
    return post(json.dumps(body).encode(), b"connection: close")


def token_ids(answer: bytes) -> list[int]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["token_ids"]


def wait_for_requests(stepper: Stepper, number: int) -> None:
    """Wait until the engine has been given so many."""
    deadline = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if len(stepper.engine._streams) >= number:
            return
        deadline.wait(0.005)
    raise AssertionError("the request has not come")


def check_leaves(monkeypatch, number: int, max_inflight: int, **fields: object) -> None:
    """Leave in the middle of a step: none but those under way may compute for who has gone."""
    max_num_seqs = 1 if number == 0 else 4  # the witness has the only row: the leaver waits
    limits = {"max_inflight": max_inflight, "max_num_seqs": max_num_seqs}
    with stepped(monkeypatch, **limits) as (wire, stepper, inbox):
        alone = token_ids(wire.exchange(request(WITNESS, 40)))
        stepper.hold()
        with wire.connect() as witness:
            witness.sendall(request(WITNESS, 40))
            stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 1)
            with wire.connect() as leaver:
                leaver.sendall(request(LEAVER, NUM_TOKENS, **fields))
                wait_for_requests(stepper, 2)
                stepper.hold_at(LEAVER, number)
                if number == 0:  # let it be queued, and passed over
                    stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 3)
                    assert LEAVER in stepper.steps[-1].held
            assert inbox.is_told.wait(PATIENCE_S)  # no step had to end for that
            num_before = len(stepper.steps)
            stepper.open()
            assert token_ids(read_all(witness)) == alone
        after = stepper.steps[num_before:]
        assert len(after) > 10
        # A step of a runner that works ahead may have been planned before the message is read.
        assert sum(LEAVER in step.computed for step in after) <= max_inflight - 1
        for step in after[max_inflight - 1 :]:
            assert LEAVER not in step.held
            assert step.num_stray_blocks == 0
        assert [end.reason for end in inbox.ends] == ["abort"]


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_d01_stream_that_is_left_is_free_within_two_steps(monkeypatch, moment, max_inflight):
    check_leaves(monkeypatch, MOMENTS[moment], max_inflight, stream=True)


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1, "seed": 5}])
@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_d02_whole_answer_that_is_left_is_free_within_two_steps(
    monkeypatch, moment, max_inflight, fields
):
    check_leaves(monkeypatch, MOMENTS[moment], max_inflight, **fields)


@pytest.mark.parametrize("stream", [True, False])
def test_d01_client_that_leaves_after_the_end_ends_nothing_else(monkeypatch, stream):
    """Its request is over; what follows on the connection's death has nobody to hit."""
    with stepped(monkeypatch) as (wire, stepper, inbox):
        alone = token_ids(wire.exchange(request(WITNESS, 40)))
        stepper.hold()
        with wire.connect() as witness:
            witness.sendall(request(WITNESS, 40))
            stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 1)
            with wire.connect() as leaver:
                leaver.sendall(request(LEAVER, NUM_TOKENS, stream=stream))
                wait_for_requests(stepper, 2)
                stepper.hold_at(LEAVER, 3 + NUM_TOKENS - 1)
                stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 2)
                assert b"finish_reason" in read_all(leaver)
            num_before = len(stepper.steps)
            stepper.open()
            assert token_ids(read_all(witness)) == alone
        for step in stepper.steps[num_before - 1 :]:
            assert step.held <= {WITNESS}
            assert step.num_stray_blocks == 0
        assert inbox.ends == []
