"""The whole server over a runner that breaks when a prompt tells it to.

`python -m tests.battery.server` writes its port, then serves. Faults are asked for in prompts, of
this runner alone: `fault:raise`, `fault:once`, `fault:hang`, `fault:lost` (no step succeeds ever
after), `fault:bug` (the scheduler itself breaks once).
"""

import dataclasses
import sys
import threading

from app.api.connections import EdgeConfig
from app.engine import loop
from app.engine.engine import Engine, EngineOptions
from app.engine.scheduler import ScheduledStep, Scheduler
from app.factory import create_app
from app.main import DrainingServer, bind, set_up_logging
from app.serving.metrics import RequestMetrics
from app.settings import ServerSettings
from model.step import FillMasks, RunnerLimits, StepHandle, StepPlan
from tests.fake_engine import VOCAB, FakeEngine, make_context, says
from tests.fake_runner import FakeRunner

LIMITS = RunnerLimits(
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=512,
    block_size=16,
    num_blocks=256,
    vocab_size=VOCAB,
)


class FaultyRunner(FakeRunner):
    """Does what FakeRunner does, unless a sequence in the step asks for a fault."""

    def __init__(self) -> None:
        super().__init__(LIMITS)
        self._faults: dict[int, str] = {}  # by row
        self._had_once = False
        self._is_lost = False

    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        for row in plan.removed:
            self._faults.pop(row, None)
        for new in plan.added:
            text = bytes(i for i in new.token_ids if i < 256).decode("utf-8", "replace")
            if "fault:" in text:
                self._faults[new.row] = text.partition("fault:")[2].split()[0]
        for fault in [self._faults[row.row] for row in plan.rows if row.row in self._faults]:
            self._break(fault)
        if self._is_lost:
            raise RuntimeError("device lost")
        return super().launch(plan, fill_masks)

    def _break(self, fault: str) -> None:
        if fault == "raise":
            raise MemoryError("out of memory")
        if fault == "once" and not self._had_once:
            self._had_once = True
            raise RuntimeError("transient")
        if fault == "hang":
            threading.Event().wait()
        self._is_lost |= fault == "lost"


class BuggyScheduler(Scheduler):
    """Breaks once, in the middle of its work, when a request asks for it."""

    has_broken = False

    def schedule(self) -> ScheduledStep | None:
        asks = any(b"fault:bug" in bytes(i for i in s.token_ids if i < 256) for s in self.running)
        if asks and not BuggyScheduler.has_broken:
            BuggyScheduler.has_broken = True
            self.running.clear()
            raise KeyError("a bug")
        return super().schedule()


def main() -> None:
    """Serve until a signal or a fault ends it; the exit code is the server's."""
    settings = ServerSettings(port=0, shutdown_timeout_s=1.0)
    set_up_logging("info")
    loop.FIRST_PATIENCE_S = loop.MIN_PATIENCE_S = 0.5
    engine = Engine(FaultyRunner(), EngineOptions())
    scheduler = BuggyScheduler(LIMITS)
    engine._step_loop._scheduler = scheduler
    fake = FakeEngine(says(""))  # whose limits and names the context has
    fake.limits = LIMITS
    context = make_context(fake)
    metrics = RequestMetrics("fake", engine.stats)
    context = dataclasses.replace(context, engine=engine, metrics=metrics)
    listener = bind(settings)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    server = DrainingServer(EdgeConfig(create_app(context, settings), settings), engine, 1.0)
    server.run(sockets=[listener])
    sys.exit(1 if server.has_failed else 0)


if __name__ == "__main__":
    main()
