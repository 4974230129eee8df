"""What the engine notes of a request, and counts of its steps."""

import asyncio

from tests.engine.test_engine import Running, collect, make_request


def test_every_request_is_queued_admitted_begun_and_done_in_order_even_if_preempted():
    async def scenario():
        limits = {"num_blocks": 12, "max_model_len": 32, "max_inflight": 2}
        async with Running(max_num_queued_seqs=100, **limits) as engine:
            requests = [
                make_request(str(name), max_tokens=20, prompt=(name, name + 1))
                for name in range(40)
            ]
            await asyncio.gather(*(collect(engine.submit(request)) for request in requests))
            stats, measures = engine.stats(), engine.measures
        timelines = [request.timeline for request in requests]
        for timeline in timelines:
            names = [event.name for event in timeline.events]
            assert names[0] == "queued"
            assert names[-1] == "done"
            assert names.count("first_token") == 1
            assert names.count("admitted") == names.count("preempted") + 1
            assert names.index("admitted") < names.index("prefill") < names.index("first_token")
            seconds = [event.at_s for event in timeline.events]
            assert seconds == sorted(seconds)
        events = [event for timeline in timelines for event in timeline.events]
        num_preempted = sum(event.name == "preempted" for event in events)
        assert num_preempted == stats.num_preemptions > 0
        assert sum(measures.step_tokens.counts) == stats.num_steps
        assert measures.step_tokens.total == stats.num_scheduled_tokens
        assert 0 < sum(measures.step_seconds.counts) <= stats.num_steps

    asyncio.run(scenario())
