"""GET /v1/requests/{id}: what became of a request, for the key that made it."""

import asyncio

from app.engine.timeline import MAX_EVENTS, Timeline
from app.serving.request_log import RequestLog, RequestRecord
from app.settings import ApiKey
from tests.api.serve import client_of, run
from tests.fake_engine import FakeEngine, says

URL = "/v1/completions"


def record(name: str, tenant: str = "") -> RequestRecord:
    return RequestRecord(request_id=name, answer_id=f"{name}-1", tenant=tenant, arrival_s=0.0)


def test_a_request_is_found_by_its_own_id_and_by_its_answers():
    async def scenario():
        async with client_of(FakeEngine(says("abc"))) as client:
            headers = {"x-request-id": "mine"}
            answer = await client.post(URL, json={"prompt": "ab", "n": 2}, headers=headers)
            views = [
                (await client.get(f"/v1/requests/{name}")).json()
                for name in ("mine", answer.json()["id"])
            ]
        assert views[0] == views[1]
        view = views[0]
        assert view["status"] == "done"
        assert (view["prompt_tokens"], view["completion_tokens"]) == (3, 8)  # with the ends of text
        for choice in (0, 1):
            own = [event for event in view["events"] if event["choice"] == choice]
            assert [event["event"] for event in own] == [
                "queued",
                "admitted",
                "first_token",
                "done",
            ]
            assert own[1]["tokens"] == 4
            assert own[-1]["reason"] == "stop"
        seconds = [event["seconds"] for event in view["events"]]
        assert seconds == sorted(seconds)
        assert seconds[0] >= 0

    run(scenario())


def test_only_the_key_that_made_a_request_is_told_of_it():
    async def scenario():
        keys = (ApiKey(name="alice", key="a"), ApiKey(name="bob", key="b"))
        async with client_of(FakeEngine(says("x")), named_keys=keys) as client:
            alice = {"authorization": "Bearer a", "x-request-id": "mine"}
            answer = await client.post(URL, json={"prompt": "a"}, headers=alice)
            for name in ("mine", answer.json()["id"]):
                path = f"/v1/requests/{name}"
                assert (await client.get(path, headers=alice)).status_code == 200
                other = await client.get(path, headers={"authorization": "Bearer b"})
                assert other.status_code == 404
                assert other.json()["error"]["param"] == "id"
                assert (await client.get(path)).status_code == 401

    run(scenario())


def test_status_is_that_of_choices_that_left_and_came_back():
    timeline = Timeline()
    entry = record("a")
    entry.num_choices = 2
    entry.timelines.append(timeline)
    seen = [entry.status]
    for name, choice, reason in [
        ("queued", 0, None),
        ("queued", 1, None),
        ("admitted", 0, None),
        ("done", 0, "length"),
        ("done", 1, "abort"),  # parked
        ("queued", 1, None),
        ("admitted", 1, None),
        ("done", 1, "stop"),
    ]:
        timeline.note(name, choice, reason=reason)
        seen.append(entry.status)
    assert seen == [
        *("queued", "queued", "queued", "running", "running"),
        *("parked", "running", "running", "done"),
    ]
    entry.is_over = True
    assert entry.status == "done"


def test_a_request_that_runs_is_told_of_too():
    async def scenario():
        engine = FakeEngine(says("x"))
        engine.gate.clear()
        async with client_of(engine) as client:
            headers = {"x-request-id": "slow"}
            posting = asyncio.ensure_future(client.post(URL, json={"prompt": "a"}, headers=headers))
            while not engine.streams:
                await asyncio.sleep(0)
            assert (await client.get("/v1/requests/slow")).json()["status"] == "running"
            engine.gate.set()
            await posting
            assert (await client.get("/v1/requests/slow")).json()["status"] == "done"

    run(scenario())


def test_the_oldest_are_forgotten():
    log = RequestLog(max_records=2)
    records = [record(name) for name in ("a", "b", "b")]
    for each, answer_id in zip(records, ("a-1", "b-1", "b-2"), strict=True):
        each.answer_id = answer_id
        log.add(each)
    assert log.find("", "b") is records[2]
    assert log.find("", "b-1") is records[1]
    log.add(record("c"))
    assert log.find("", "b") is records[2]  # the later of that name, though one is gone


def test_a_timeline_is_bounded_and_keeps_how_it_ends():
    timeline = Timeline()
    for _ in range(MAX_EVENTS + 10):
        timeline.note("preempted", 0)
    timeline.note("done", 0, reason="stop")
    assert len(timeline.events) == MAX_EVENTS + 1
    assert timeline.num_dropped == 10
    assert timeline.events[-1].reason == "stop"
