"""Group D, a flood against an engine that is held: refusals need no step of it, and say when.

Floods of a server that runs are in test_d_load.py and test_d_retries.py, and reported by
`python -m tests.battery.flood`.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from app.engine.admission import Admission
from app.settings import ApiKey
from tests.api.wire import Wire, read_all
from tests.battery.client import Answer, answer_of
from tests.battery.stepper import Stepper, request, stepped, wait_for_requests
from tests.engine.test_admission import Clock

RUNNING, REFUSED = (9, 8, 7), (5, 6)
NUM_QUEUED = 8
PACE_S = 2.0  # between two ends
SENT = b"authorization: Bearer alice"
OTHER = ApiKey(name="bob", key="secret")  # whose requests show that a server is well
DURATION = re.compile(r"(\d+m)?\d+(\.\d+)?s|\d+ms")


def check_limits(answer: Answer) -> None:
    """What docs/api.md says of every answer to a key with limits."""
    for what, limit in (("requests", 60), ("tokens", 600)):
        assert answer.headers[f"x-ratelimit-limit-{what}"] == str(limit)
        assert 0 <= int(answer.headers[f"x-ratelimit-remaining-{what}"]) <= limit
        assert DURATION.fullmatch(answer.headers[f"x-ratelimit-reset-{what}"])


def ask(wire: Wire, prompt: tuple[int, ...]) -> Answer:
    return answer_of(wire.exchange(request(prompt, 20, headers=(SENT,))))


@contextmanager
def full(monkeypatch, **limits: int) -> Iterator[tuple[Wire, Stepper, list]]:
    """A server in the middle of a step whose queue is full; the clients that wait for it."""
    edges = {"named_keys": (ApiKey(name="alice", key="alice", **limits), OTHER)}
    with (
        stepped(monkeypatch, edges=edges, max_num_seqs=1) as (wire, stepper, _),
        ExitStack() as stack,
    ):
        clock = Clock()
        stepper.engine._admission = admission = Admission(NUM_QUEUED, 1 << 20, clock)
        admission.enter(0)
        for _ in range(50):
            clock.now_s += PACE_S
            admission.end(num_live=1)
        stepper.hold()
        clients = []
        for number in range(1 + NUM_QUEUED):
            clients.append(stack.enter_context(wire.connect()))
            clients[-1].sendall(request((*RUNNING, number), 20, headers=(SENT,)))
            wait_for_requests(stepper, number + 1)
            stepper.hold_at((*RUNNING, 0), 1)  # it has its row, the others wait
        yield wire, stepper, clients


def test_d04_refusals_of_a_held_engine_say_when_and_cost_no_step(monkeypatch):
    prompts = [(*RUNNING, number) for number in range(1 + NUM_QUEUED)]
    with stepped(monkeypatch) as (wire, _, _):
        alone = [ask(wire, prompt).token_ids for prompt in prompts]
    with full(monkeypatch) as (wire, stepper, clients):
        num_steps = len(stepper.steps)
        refusals = [ask(wire, REFUSED) for _ in range(60)]
        for number, answer in enumerate(refusals, start=1):
            error = answer.check_refusal(503)
            assert (error["type"], error["code"]) == ("service_unavailable_error", "overloaded")
            wait_s = min(number * PACE_S, 60.0)  # a place for each before it
            assert answer.headers["retry-after"] == f"{wait_s:.0f}"
            assert answer.headers["retry-after-ms"] == f"{1000 * wait_s:.0f}"
            assert answer.headers["x-should-retry"] == "true"
        for path in (b"/health/live", b"/health/ready", b"/health"):
            head = b"GET " + path + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
            assert wire.exchange(head).startswith(b"HTTP/1.1 200 ")
        assert len(stepper.steps) == num_steps  # the engine has not moved for any of it
        stepper.open()
        for number, client in enumerate(clients):  # who was let in is served
            answer = answer_of(read_all(client))
            assert answer.token_ids == alone[number]
        assert ask(wire, REFUSED).status == 200  # there is room again
        assert {step.num_rows for step in stepper.steps} == {1}
        held = [step for step in stepper.steps if REFUSED in step.held]
        assert len(held) == 20  # of the last one's own
        assert stepper.engine.stats().num_refused_seqs == 60


def test_d04_refusals_tell_a_key_its_limits_and_give_its_tokens_back(monkeypatch):
    limits = {"requests_per_minute": 60, "tokens_per_minute": 600}
    with full(monkeypatch, **limits) as (wire, stepper, clients):
        for _ in range(40):  # each takes 22 tokens; 600 would not do for so many
            answer = ask(wire, REFUSED)
            assert answer.check_refusal(503)["code"] == "overloaded"
            check_limits(answer)
        # Requests count even if they are refused: soon there is none left.
        answer = next(
            answer for answer in (ask(wire, REFUSED) for _ in range(100)) if answer.status == 429
        )
        error = answer.check_refusal(429)
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        check_limits(answer)
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(answer.headers["retry-after-ms"]) <= 1000  # one comes back every second
        assert answer.headers["retry-after"] == "1"
        stepper.open()
        for client in clients:
            answer = answer_of(read_all(client))
            assert len(answer.token_ids) == 20
            check_limits(answer)
