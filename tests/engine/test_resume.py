"""Requests that leave the engine and come back: the same tokens, each once, and nothing held."""

import asyncio

import pytest

from app.engine.client import EngineRequest
from app.engine.resume import ResumableStream
from app.errors import Overloaded
from model.step import SamplingParams
from tests.engine.drive import VOCAB, Script
from tests.engine.test_engine import PROMPT, Gate, Running, collect, make_request, reasons, tokens
from tests.fake_runner import expected_tokens


def request_of(n: int, *, max_tokens: int = 12, **fields) -> EngineRequest:
    sampling = tuple(
        SamplingParams(temperature=1.0, seed=4, choice=choice, max_tokens=max_tokens + 3 * choice)
        for choice in range(n)
    )
    return EngineRequest(request_id="a", prompt_token_ids=PROMPT, sampling=sampling, **fields)


async def leave_and_return(engine, stream: ResumableStream, at: set[int]):
    """Read a stream to its end; after each so many tokens it leaves the engine and comes back."""
    outputs = []
    returns = []

    async def come_back() -> None:
        await stream.resume()

    async for wakeup in stream:
        outputs += wakeup
        num_tokens = sum(len(output.token_ids) for output in outputs)
        if due := {count for count in at if count <= num_tokens}:
            at -= due
            stream.park()
            returns.append(asyncio.ensure_future(come_back()))
    await asyncio.gather(*returns)
    return outputs


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at", [{1}, {5}, {11}, {1, 2, 3, 4, 5, 6, 7, 8, 9}, {12, 20, 30}])
def test_not_a_token_is_lost_or_repeated(max_inflight, n, at):
    async def scenario():
        async with Running(max_inflight=max_inflight) as engine:
            request = request_of(n)
            outputs = await leave_and_return(engine, ResumableStream(engine, request), set(at))
            for index, sampling in enumerate(request.sampling):
                expected = expected_tokens(list(PROMPT), sampling, VOCAB)
                assert tokens(outputs, index) == expected
                own = [output for output in outputs if output.index == index]
                assert reasons(own) == ["length"]
            assert engine.stats().num_free_blocks == engine.stats().num_blocks

    asyncio.run(scenario())


def test_timeline_goes_on_under_the_numbers_of_the_choices():
    async def scenario():
        async with Running() as engine:
            request = request_of(2, max_tokens=4)  # choice 1 has three more
            await leave_and_return(engine, ResumableStream(engine, request), {8, 9})
            for choice in (0, 1):
                own = [event for event in request.timeline.events if event.choice == choice]
                names = [event.name for event in own]
                assert names[0] == "queued"
                assert names.count("first_token") == 1
                assert names.count("queued") == names.count("done")
                assert [event.reason for event in own if event.name == "done"][-1] == "length"

    asyncio.run(scenario())


def test_prompt_logprobs_are_given_once():
    async def scenario():
        async with Running(max_num_batched_tokens=4) as engine:
            sampling = SamplingParams(temperature=0.0, max_tokens=9, prompt_logprobs=0)
            prompt = tuple(range(1, 20))
            request = EngineRequest(
                request_id="a",
                prompt_token_ids=prompt,
                sampling=(sampling,),
                read_prefix_cache=False,
            )
            stream = ResumableStream(engine, request)
            outputs = []
            returning = None
            async for wakeup in stream:
                outputs += wakeup
                if returning is None:  # in the middle of its prompt, unless the engine was faster
                    stream.park()
                    returning = asyncio.ensure_future(stream.resume())
            await returning
            entries = [entry.token_id for out in outputs for entry in out.prompt_logprobs]
            assert entries == list(prompt[1:])
            assert tokens(outputs) == expected_tokens(list(prompt), sampling, VOCAB)

    asyncio.run(scenario())


def test_nothing_is_held_while_away_and_an_abort_ends_it_there():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            stream = ResumableStream(engine, make_request("a", n=2, max_tokens=40))
            reading = asyncio.ensure_future(collect(stream))
            await asyncio.to_thread(gate.is_reached.wait)
            stream.park()
            gate.is_open.set()
            other = await collect(engine.submit(make_request("other")))
            assert reasons(other) == ["length"]
            stats = engine.stats()
            assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
            assert stats.num_free_blocks == stats.num_blocks
            assert not reading.done()
            stream.abort()
            assert reasons(await reading) == ["abort", "abort"]
            await stream.resume()  # nobody to come back
            assert engine.stats().num_requests_waiting == 0

    asyncio.run(scenario())


def test_return_that_is_refused_can_be_tried_again():
    async def scenario():
        gate = Gate()
        async with Running(gate, max_num_queued_seqs=2, max_num_seqs=1) as engine:
            stream = ResumableStream(engine, make_request("a"))
            reading = asyncio.ensure_future(collect(stream))
            await asyncio.to_thread(gate.is_reached.wait)
            stream.park()
            gate.is_open.set()
            while engine.stats().num_requests_running or engine.stats().num_requests_waiting:
                await asyncio.sleep(0)
            gate.is_open.clear()
            others = [engine.submit(make_request("running"))]
            while not engine.stats().num_requests_running:
                await asyncio.sleep(0)
            others += [engine.submit(make_request(str(name))) for name in range(2)]
            with pytest.raises(Overloaded):
                await stream.resume()
            gate.is_open.set()
            await asyncio.gather(*(collect(other) for other in others))
            await asyncio.gather(stream.resume(), stream.resume())  # once is enough
            outputs = await reading
            assert tokens(outputs) == expected_tokens(
                list(PROMPT), make_request("a").sampling[0], VOCAB
            )
            assert reasons(outputs) == ["length"]

    asyncio.run(scenario())


def test_constraint_goes_on_behind_what_it_has_accepted():
    async def scenario():
        async with Running() as engine:
            request = request_of(2, constraints=(Script(ends_at=8), Script(ends_at=8)))
            outputs = await leave_and_return(engine, ResumableStream(engine, request), {2, 5, 9})
            for index, sampling in enumerate(request.sampling):
                expected = expected_tokens(list(PROMPT), sampling, VOCAB)[:8]
                assert tokens(outputs, index) == expected
            assert reasons(outputs) == ["stop", "stop"]

    asyncio.run(scenario())


def test_choice_that_was_stopped_by_its_text_does_not_come_back():
    async def scenario():
        gate = Gate()
        async with Running(gate) as engine:
            stream = ResumableStream(engine, make_request("a", n=2, max_tokens=20))
            reading = asyncio.ensure_future(collect(stream))
            await asyncio.to_thread(gate.is_reached.wait)
            stream.park()
            stream.finish(1)
            gate.is_open.set()
            await stream.resume()
            outputs = await reading
            own = [output for output in outputs if output.index == 0]
            expected = expected_tokens(list(PROMPT), make_request("a").sampling[0], VOCAB)
            assert tokens(own)[:8] == expected
            assert reasons(own) == ["length"]
            assert engine.stats().num_requests_running == 0

    asyncio.run(scenario())
