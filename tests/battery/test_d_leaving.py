"""Group D, leaving: how many steps a request may still take once its client has gone.

A whole server on a socket, its engine over a runner whose steps a test lets go one by one: what is
counted are steps, and no clock is asked. That the same holds of the shared server under load is in
test_d_load.py.
"""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.api.wire import Wire, read_all
from tests.battery.stepper import (
    PATIENCE_S,
    Stepper,
    request,
    stepped,
    token_ids,
    wait_for_requests,
)

WITNESS = (9, 8, 7)
LEAVER = (5,) * 40
NUM_TOKENS = 8
# A step has 16 tokens: one of the witness, 15 of the leaver's prompt, which so takes three steps:
# 15, 15 and 10 tokens. The third samples its first token.
MOMENTS = {  # the step of the leaver's that is under way when its client goes; 0: it still waits
    "queued": 0,
    "its prompt begun": 1,
    "mid prefill": 2,
    "before the first token": 3,
    "mid stream": 6,
    "at the last token": 3 + NUM_TOKENS - 1,
}


@contextlib.contextmanager
def held_witness(wire: Wire, stepper: Stepper) -> Iterator[socket.socket]:
    """The connection of a witness, held in the middle of a step."""
    stepper.hold()
    with wire.connect() as witness:
        witness.sendall(request(WITNESS, 40))
        stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 1)
        yield witness


@contextlib.contextmanager
def leaving(wire: Wire, stepper: Stepper, number: int, **fields: object) -> Iterator[socket.socket]:
    """The connection of a client that goes at the end of this, its request held in a step."""
    with wire.connect() as leaver:
        leaver.sendall(request(LEAVER, NUM_TOKENS, **fields))
        wait_for_requests(stepper, 2)
        stepper.hold_at(LEAVER, number)
        yield leaver


def check_leaves(monkeypatch, number: int, max_inflight: int, **fields: object) -> None:
    """Leave in the middle of a step: none but those under way may compute for who has gone."""
    max_num_seqs = 1 if number == 0 else 4  # the witness has the only row: the leaver waits
    limits = {"max_inflight": max_inflight, "max_num_seqs": max_num_seqs}
    with stepped(monkeypatch, **limits) as (wire, stepper, inbox):
        alone = token_ids(wire.exchange(request(WITNESS, 40)))
        with held_witness(wire, stepper) as witness:
            with leaving(wire, stepper, number, **fields):
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
        with held_witness(wire, stepper) as witness:
            with leaving(wire, stepper, MOMENTS["at the last token"], stream=stream) as leaver:
                stepper.hold_at(WITNESS, stepper.num_steps_of(WITNESS) + 2)
                assert b"finish_reason" in read_all(leaver)
            num_before = len(stepper.steps)
            stepper.open()
            assert token_ids(read_all(witness)) == alone
        for step in stepper.steps[num_before - 1 :]:
            assert step.held <= {WITNESS}
            assert step.num_stray_blocks == 0
        assert inbox.ends == []
