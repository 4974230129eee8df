"""The watchdog's verdicts, and how the engine measures its own silence."""

import asyncio
import time

import pytest

from app.engine.watchdog import Verdict, Watchdog
from tests.engine.test_engine import Gate, Running, collect, make_request, reasons
from tests.fake_engine import FakeEngine, says


@pytest.fixture
def engine():
    return FakeEngine(says("x"))


@pytest.fixture
def watchdog(engine):
    made = Watchdog(engine)
    yield made
    made.stop()


def test_working_engine_goes_on(watchdog):
    assert watchdog.look() is Verdict.GO_ON


def test_dead_engine_ends_the_process(engine, watchdog, caplog):
    engine.is_alive = False
    assert watchdog.look() is Verdict.LEAVE
    assert "has died" in caplog.text


def test_stuck_step_is_shown_once_and_given_up_later(engine, watchdog, caplog, capfd):
    engine.age_s = 40
    for _ in range(3):
        assert watchdog.look() is Verdict.GO_ON
    assert caplog.text.count("far too long") == 1
    assert "Current thread" in capfd.readouterr().err
    assert engine.is_alive
    engine.age_s = 100
    assert watchdog.look() is Verdict.LEAVE
    assert not engine.is_alive


def test_step_that_comes_back_is_forgiven(engine, watchdog, caplog):
    engine.age_s = 40
    watchdog.look()
    engine.age_s = 0
    assert watchdog.look() is Verdict.GO_ON
    engine.age_s = 40
    watchdog.look()
    assert caplog.text.count("far too long") == 2


def test_hanging_step_is_stuck_and_its_streams_can_be_told(monkeypatch):
    async def scenario():
        monkeypatch.setattr("app.engine.loop.FIRST_PATIENCE_S", 0.05)
        gate = Gate()
        async with Running(gate) as engine:
            assert engine.stuck_for == 0
            reading = asyncio.create_task(collect(engine.submit(make_request("a"))))
            deadline = time.monotonic() + 20
            while engine.stuck_for < 1:
                assert time.monotonic() < deadline
                await asyncio.sleep(0)
            engine.give_up("hangs")
            assert reasons(await reading) == ["error"]
            assert not engine.is_alive
            gate.is_open.set()

    asyncio.run(scenario())
