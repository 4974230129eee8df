"""Group D, stalled readers: the engine never waits for one, and the limit ends it.

What others receive is compared step by step, so that no clock is asked. See also test_d_load.py.
"""

import contextlib
import socket

from tests.api.wire import Wire, read_all
from tests.battery.client import events_of
from tests.battery.stepper import (
    PATIENCE_S,
    Prompt,
    Stepper,
    request,
    stepped,
    token_ids,
    wait_for_requests,
    wait_until,
)

WITNESS = (9, 8, 7)
NUM_READERS = 50
NUM_CHOICES = 2  # of each
MAX_TOKENS = 220
NUM_ROWS = NUM_READERS * NUM_CHOICES + 1
LIMITS = {
    "max_num_seqs": NUM_ROWS,
    "max_num_batched_tokens": 1024,
    "max_model_len": 256,
    "num_blocks": NUM_ROWS * 64,
}
WITHOUT_BUFFERS = {"send_buffer": 4096}
LARGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def stall(wire: Wire, prompt: Prompt) -> socket.socket:
    """Ask for a stream and read nothing of it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(PATIENCE_S)
    client.connect(wire.address)
    client.sendall(request(prompt, MAX_TOKENS, n=NUM_CHOICES, stream=True, temperature=1, **LARGE))
    return client


def num_stalled(wire: Wire) -> int:
    """Connections whose buffers are all full."""
    return sum(each.flow.write_paused for each in list(wire.config.open_connections._client_of))


def ids_of(answer: bytes) -> list[int]:
    """The tokens in what has come of a stream, whose last event may be incomplete."""
    events = events_of(answer.rpartition(b"\n\n")[0] + b"\n\n")
    choices = [event["choices"][0] for event in events if event.get("choices")]
    return [token_id for choice in choices for token_id in choice["token_ids"] or ()]


def read_tokens(client: socket.socket, answer: bytes, number: int) -> bytes:
    """Read on until so many tokens have come."""
    while len(ids_of(answer)) < number:
        part = client.recv(65536)
        assert part, answer[-300:]
        answer += part
    return answer


def stall_all(wire: Wire, stepper: Stepper, prompts: list[Prompt]) -> int:
    """Go on until the buffers of all readers are full; return the witness's steps so far."""
    for number in range(2, MAX_TOKENS):
        stepper.hold_at(WITNESS, number)
        if num_stalled(wire) == len(prompts):
            return number
    raise AssertionError(f"{num_stalled(wire)} of {len(prompts)} readers have stalled")


def test_d03_each_token_reaches_others_before_the_next_step_while_50_readers_stall(monkeypatch):
    with (
        stepped(monkeypatch, edges=WITHOUT_BUFFERS, **LIMITS) as (wire, stepper, inbox),
        contextlib.ExitStack() as stack,
    ):
        alone = token_ids(wire.exchange(request(WITNESS, MAX_TOKENS)))
        stepper.steps.clear()
        stepper.hold()
        prompts = [(20 + number, 5) for number in range(NUM_READERS)]
        stalled = [stack.enter_context(stall(wire, prompt)) for prompt in prompts]
        witness = stack.enter_context(wire.connect())
        witness.sendall(request(WITNESS, MAX_TOKENS, stream=True))
        wait_for_requests(stepper, NUM_READERS + 1)
        number, answer = stall_all(wire, stepper, prompts), b""
        assert number < MAX_TOKENS - 50
        for place in range(number, number + 40):
            stepper.hold_at(WITNESS, place)  # the step before is over, this one is not begun
            answer = read_tokens(witness, answer, place - 1)
            assert stepper.steps[-1].num_rows == NUM_ROWS  # stalled or not, all go on
        assert num_stalled(wire) == NUM_READERS
        stepper.open()
        assert ids_of(answer + read_all(witness)) == alone
        wait_until(lambda: not stepper.engine.stats().num_requests_running)
        assert inbox.ends == []  # all have been generated, though nobody has read them
        assert stepper.engine.stats().num_free_blocks == LIMITS["num_blocks"]
        # One step before all were there, then one a token: none has waited for anything.
        assert len(stepper.steps) == MAX_TOKENS + 1
        late = read_all(stalled[0])  # within the limit, who reads on gets all of it
        assert len(ids_of(late)) == MAX_TOKENS * NUM_CHOICES
        assert b"data: [DONE]" in late


def test_d03_limit_cuts_a_stalled_stream_off_and_frees_what_it_holds(monkeypatch):
    edges = {**WITHOUT_BUFFERS, "body_timeout_s": 0.3}
    with stepped(monkeypatch, edges=edges, **LIMITS) as (wire, stepper, inbox):
        alone = token_ids(wire.exchange(request(WITNESS, MAX_TOKENS)))
        stepper.steps.clear()
        stepper.hold()
        with wire.connect() as witness:
            witness.sendall(request(WITNESS, MAX_TOKENS))
            wait_for_requests(stepper, 1)
            with stall(wire, (20, 5)) as reader:
                wait_for_requests(stepper, 2)
                stall_all(wire, stepper, [(20, 5)])
                assert inbox.is_told.wait(PATIENCE_S)  # in the middle of a step
                num_before = len(stepper.steps)
                stepper.open()
                assert token_ids(read_all(witness)) == alone
                cut = read_all(reader)
        assert [end.reason for end in inbox.ends] == ["abort"]
        assert {step.held for step in stepper.steps[num_before:]} == {frozenset({WITNESS})}
        assert {step.num_stray_blocks for step in stepper.steps} == {0}
        assert ids_of(cut)  # what was in the buffers on the way
        assert b"[DONE]" not in cut
        assert not cut.endswith(b"0\r\n\r\n")  # nor does it look like a whole answer
