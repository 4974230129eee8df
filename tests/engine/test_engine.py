"""The engine with its real thread and a real event loop, over a runner without tensors."""

import asyncio
import threading
import time

import pytest

from app.engine.client import EngineRequest, SequenceOutput
from app.engine.engine import Engine, EngineOptions
from app.engine.scheduler import Scheduler
from app.errors import ContextLengthExceeded, Draining, EngineDead, Overloaded
from model.step import RunnerLimits, SamplingParams, StepPlan
from tests.engine.drive import VOCAB, make_limits
from tests.fake_runner import FakeRunner, expected_tokens

PROMPT = tuple(range(1, 9))


def make_request(name: str, *, max_tokens: int = 8, n: int = 1, **fields) -> EngineRequest:
    sampling = tuple(
        SamplingParams(temperature=0.0, max_tokens=max_tokens, choice=choice) for choice in range(n)
    )
    return EngineRequest(
        request_id=name,
        prompt_token_ids=fields.pop("prompt", PROMPT),
        sampling=sampling,
        **fields,
    )


class Gate:
    """Lets a test hold the device: launches wait until the gate is open."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self.fails: list[Exception] = []

    def __call__(self, plan: StepPlan) -> None:
        self.is_reached.set()
        assert self.is_open.wait(20)
        if self.fails:
            raise self.fails.pop()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


def open_gate() -> Gate:
    gate = Gate()
    gate.is_open.set()
    return gate


class Running:
    """An engine for the length of a test."""

    def __init__(
        self, gate: Gate | None = None, *, max_num_queued_seqs: int = 8, **limits: int
    ) -> None:
        self.limits: RunnerLimits = make_limits(**limits)
        self.runner = FakeRunner(self.limits, on_launch=gate or open_gate())
        self.options = EngineOptions(max_num_queued_seqs=max_num_queued_seqs)

    async def __aenter__(self) -> Engine:
        self.engine = Engine(self.runner, self.options)
        self.engine.start()
        return self.engine

    async def __aexit__(self, *exc: object) -> None:
        await self.engine.shutdown()
        assert not self.engine.is_alive


async def collect(stream) -> list[SequenceOutput]:
    return [output async for outputs in stream for output in outputs]


def tokens(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [token for out in outputs if out.index == index for token in out.token_ids]


def reasons(outputs: list[SequenceOutput]) -> list[str]:
    return [output.finish_reason for output in outputs if output.finish_reason]


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_every_choice_streams_its_tokens_and_ends_once(max_inflight):
    async def scenario():
        async with Running(max_inflight=max_inflight) as engine:
            request = make_request("a", n=3)
            outputs = await collect(engine.submit(request))
            for index in range(3):
                expected = expected_tokens(list(PROMPT), request.sampling[index], VOCAB)
                assert tokens(outputs, index) == expected
            assert reasons(outputs) == ["length"] * 3
            assert engine.stats().num_free_blocks == engine.stats().num_blocks

    asyncio.run(scenario())


def test_many_requests_at_once_all_end_right_in_a_pool_that_is_too_small():
    async def scenario():
        async with Running(
            max_num_queued_seqs=100, num_blocks=12, max_model_len=32, max_inflight=2
        ) as engine:
            requests = [
                make_request(str(name), max_tokens=20, prompt=(name, name + 1))
                for name in range(40)
            ]
            streams = [engine.submit(request) for request in requests]
            results = await asyncio.gather(*(collect(stream) for stream in streams))
            for request, outputs in zip(requests, results, strict=True):
                prompt = list(request.prompt_token_ids)
                assert tokens(outputs) == expected_tokens(prompt, request.sampling[0], VOCAB)
            assert engine.stats().num_preemptions > 0
            assert engine.stats().num_free_blocks == 12
            assert engine.stats().num_requests_waiting == 0

    asyncio.run(scenario())


def test_slow_reader_gets_everything_merged():
    async def scenario():
        async with Running() as engine:
            slow = engine.submit(make_request("slow"))
            await collect(engine.submit(make_request("other", max_tokens=30)))
            wakeups = [outputs async for outputs in slow]
            assert len(wakeups) == 1
            assert len(tokens(wakeups[0])) == 8

    asyncio.run(scenario())


def test_aborted_request_ends_and_frees_its_blocks_within_two_steps():
    async def scenario():
        gate = Gate()
        running = Running(gate)
        async with running as engine:
            stream = engine.submit(make_request("a", max_tokens=40))
            await asyncio.to_thread(gate.is_reached.wait)
            stream.abort()
            num_steps = engine.stats().num_steps
            gate.is_open.set()
            outputs = await collect(stream)
            assert reasons(outputs) == ["abort"]
            assert engine.stats().num_free_blocks == engine.stats().num_blocks
            assert engine.stats().num_steps <= num_steps + 2

    asyncio.run(scenario())


def test_choice_finished_by_its_text_ends_with_stop_while_the_other_goes_on():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            stream = engine.submit(make_request("a", max_tokens=40, n=2))
            await asyncio.to_thread(gate.is_reached.wait)
            stream.finish(0)
            gate.is_open.set()
            outputs = await collect(stream)
            ends = {out.index: out.finish_reason for out in outputs if out.finish_reason}
            assert ends == {0: "stop", 1: "length"}
            assert len(tokens(outputs, 0)) == 1
            assert len(tokens(outputs, 1)) == 40

    asyncio.run(scenario())


def test_what_can_never_fit_is_refused_at_once():
    async def scenario():
        async with Running(max_model_len=32) as engine:
            with pytest.raises(ContextLengthExceeded, match="32 tokens"):
                engine.submit(make_request("a", max_tokens=25))
            assert engine.stats().num_requests_waiting == 0

    asyncio.run(scenario())


def test_full_queue_refuses_and_takes_again_once_it_is_shorter():
    async def scenario():
        gate = Gate()
        async with Running(gate, max_num_seqs=1) as engine:
            streams = [engine.submit(make_request(str(name))) for name in range(8)]
            await asyncio.to_thread(gate.is_reached.wait)
            engine.check_room()
            streams.append(engine.submit(make_request("one runs, eight wait")))
            with pytest.raises(Overloaded):
                engine.check_room()
            with pytest.raises(Overloaded):
                engine.submit(make_request("one too many"))
            gate.is_open.set()
            await asyncio.gather(*(collect(stream) for stream in streams))
            assert reasons(await collect(engine.submit(make_request("again")))) == ["length"]

    asyncio.run(scenario())


def test_prompts_count_as_queued_until_they_have_an_output_or_an_end():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            streams = [engine.submit(make_request(name)) for name in ("ends", "is aborted")]
            assert engine._admission.num_queued_tokens > 0
            streams[1].abort()
            gate.is_open.set()
            await asyncio.gather(*(collect(stream) for stream in streams))
            assert engine._admission.num_queued_tokens == 0
            engine.submit(make_request("is cut off"))
            engine.give_up("over")
            assert engine._admission.num_queued_tokens == 0

    asyncio.run(scenario())


def test_fault_that_does_not_come_back_costs_nobody_anything():
    async def scenario():
        gate = open_gate()
        gate.fails = [RuntimeError("device")]
        async with Running(gate) as engine:
            outputs = await collect(engine.submit(make_request("a", max_tokens=9)))
            assert reasons(outputs) == ["length"]
            assert tokens(outputs) == expected_tokens(list(PROMPT), greedy(9), VOCAB)
            assert engine.stats().num_failed_steps == 1
            assert engine.stats().num_isolated == 0

    asyncio.run(scenario())


class Poison:
    """A device that breaks whenever it computes the sequence of one prompt beyond some length."""

    def __init__(self, prompt: tuple[int, ...], breaks_at: int = 0) -> None:
        self.prompt, self.breaks_at = prompt, breaks_at
        self.rows: set[int] = set()

    def __call__(self, plan: StepPlan) -> None:
        self.rows -= set(plan.removed)
        self.rows |= {
            new.row for new in plan.added if new.token_ids[: len(self.prompt)] == self.prompt
        }
        for row in plan.rows:
            if row.row in self.rows and row.start + row.num_tokens > self.breaks_at:
                raise MemoryError("too much")


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("breaks_at", [0, len(PROMPT) + 3])
def test_request_that_breaks_steps_ends_alone_and_its_neighbours_say_what_they_would(
    breaks_at, max_inflight
):
    async def scenario():
        poison = Poison(tuple(PROMPT), breaks_at)
        limits = {"max_num_seqs": 8, "num_blocks": 64, "max_inflight": max_inflight}
        async with Running(poison, **limits) as engine:
            prompts = [(place, *PROMPT[1:]) for place in range(10, 17)]
            bad = engine.submit(make_request("bad", max_tokens=12))
            good = [
                engine.submit(make_request(str(p[0]), prompt=p, max_tokens=12)) for p in prompts
            ]
            outputs = await asyncio.gather(*(collect(stream) for stream in [bad, *good]))
            assert reasons(outputs[0]) == ["error"]
            for prompt, mine in zip(prompts, outputs[1:], strict=True):
                assert reasons(mine) == ["length"]
                assert tokens(mine) == expected_tokens(list(prompt), greedy(12), VOCAB)
            stats = engine.stats()
            assert stats.num_isolated == 1
            assert stats.num_recoveries == 0
            assert stats.num_free_blocks == 64
            assert reasons(await collect(engine.submit(make_request("later", prompt=(5,))))) == [
                "length"
            ]

    asyncio.run(scenario())


def test_two_that_break_steps_are_both_found():
    async def scenario():
        first, second = Poison((50, 1)), Poison((51, 1))

        def both(plan: StepPlan) -> None:
            for poison in (first, second):  # both follow the rows, whoever raises
                poison.rows -= set(plan.removed)
                poison.rows |= {n.row for n in plan.added if n.token_ids[:2] == poison.prompt}
            if any(row.row in first.rows | second.rows for row in plan.rows):
                raise RuntimeError("broken")

        async with Running(both, max_num_seqs=8, num_blocks=64) as engine:
            streams = [
                engine.submit(make_request(str(i), prompt=(i, 1, 2), max_tokens=6))
                for i in (47, 48, 49, 50, 51, 52, 53)
            ]
            outputs = await asyncio.gather(*(collect(stream) for stream in streams))
            ends = [reasons(output)[0] for output in outputs]
            assert ends == ["length"] * 3 + ["error"] * 2 + ["length"] * 2

    asyncio.run(scenario())


def test_broken_scheduler_is_rebuilt_and_streams_go_on(monkeypatch):
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            streams = [
                engine.submit(make_request(str(i), prompt=(i, 1, 2), max_tokens=9))
                for i in range(3)
            ]
            reading = [asyncio.create_task(collect(stream)) for stream in streams]
            schedule, calls = Scheduler.schedule, iter(range(1000))

            def broken(self):
                if next(calls) in (2, 7):
                    self.running.clear()  # as if rows were lost
                    raise KeyError("a bug")
                return schedule(self)

            monkeypatch.setattr(Scheduler, "schedule", broken)
            gate.is_open.set()
            for i, outputs in enumerate(await asyncio.gather(*reading)):
                assert reasons(outputs) == ["length"]
                assert tokens(outputs) == expected_tokens([i, 1, 2], greedy(9), VOCAB)
            assert engine.stats().num_recoveries == 2
            assert engine.is_alive

    asyncio.run(scenario())


def test_device_on_which_no_step_succeeds_is_given_up_and_every_stream_ends():
    async def scenario():
        def broken(plan: StepPlan) -> None:
            raise RuntimeError("device lost")

        async with Running(broken) as engine:
            streams = [engine.submit(make_request(str(i), max_tokens=5)) for i in range(6)]
            outputs = await asyncio.gather(*(collect(stream) for stream in streams))
            assert [reasons(output) for output in outputs] == [["error"]] * 6
            while engine.is_alive:
                await asyncio.sleep(0)
            with pytest.raises(EngineDead):
                engine.submit(make_request("d"))

    asyncio.run(scenario())


def test_lost_device_is_noticed_by_the_first_request_that_it_fails():
    async def scenario():
        def broken(plan: StepPlan) -> None:
            raise RuntimeError("device lost")

        async with Running(broken) as engine:
            assert reasons(await collect(engine.submit(make_request("a")))) == ["error"]
            deadline = time.monotonic() + 20
            while engine.is_alive:
                assert time.monotonic() < deadline
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_many_bad_requests_in_a_row_do_not_end_the_engine():
    async def scenario():
        def picky(plan: StepPlan) -> None:
            picky.rows -= set(plan.removed)
            picky.rows |= {new.row for new in plan.added if new.token_ids[0] == 9}
            if any(row.row in picky.rows for row in plan.rows):
                raise RuntimeError("bad request")

        picky.rows = set()
        async with Running(picky) as engine:
            for i in range(20):
                stream = engine.submit(make_request(str(i), prompt=(9, 1)))
                assert reasons(await collect(stream)) == ["error"]
            assert reasons(await collect(engine.submit(make_request("good")))) == ["length"]
            assert engine.stats().num_isolated == 20

    asyncio.run(scenario())


def test_drain_lets_running_requests_finish_and_takes_no_more():
    async def scenario():
        async with Running() as engine:
            stream = engine.submit(make_request("a", max_tokens=40))
            reading = asyncio.create_task(collect(stream))
            await engine.drain(20)
            with pytest.raises(Draining):
                engine.submit(make_request("b"))
            assert reasons(await reading) == ["length"]

    asyncio.run(scenario())


def test_drain_ends_what_is_left_with_an_error_after_its_limit():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            stream = engine.submit(make_request("a"))
            await asyncio.to_thread(gate.is_reached.wait)
            await engine.drain(0.01)
            gate.is_open.set()
            outputs = await collect(stream)
            assert reasons(outputs) == ["error"]
            assert outputs[-1].error == "the server is shutting down"

    asyncio.run(scenario())


def test_stuck_step_shows_in_the_heartbeat_and_an_idle_engine_does_not():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            assert engine.heartbeat_age_s() == 0
            stream = engine.submit(make_request("a"))
            await asyncio.to_thread(gate.is_reached.wait)
            before = engine.heartbeat_age_s()
            assert 0 < before < engine.heartbeat_age_s()
            gate.is_open.set()
            await collect(stream)

    asyncio.run(scenario())


def test_idle_engine_uses_no_processor_time():
    async def scenario():
        async with Running() as engine:
            await collect(engine.submit(make_request("a")))
            start = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - start < 0.05

    asyncio.run(scenario())
