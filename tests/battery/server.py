"""The whole server over faulty parts: `python -m tests.battery.server`

Reads one line of JSON, see `Options`, writes its port and serves; the exit code is the server's.
Nothing of this can be asked of the server that is shipped.
"""

import asyncio
import dataclasses
import json
import os
import resource
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import app.engine.engine as engine_module
import app.engine.scheduler as scheduler_module
import app.main as main_module
import model.loader as loader_module
from app.api.connections import EdgeConfig
from app.cli import parse
from app.engine import loop
from app.engine.admission import Admission
from app.factory import create_app
from app.logs import set_up_logging
from app.settings import read_environment
from model.loader import load_model
from model.step import RunnerLimits
from tests.battery.faults import BuggyScheduler, FaultyRunner, FaultyTokenizer
from tests.fake_runner import FakeRunner

NUM_THREADS = 4  # beside the event loop's and the engine's


@dataclass(frozen=True)
class Options:
    """The command line of `arriero serve`, and what has no flag."""

    arguments: list[str]
    log: str  # where standard error goes; "": into a pipe that nobody reads
    max_files: int | None = None  # that the process may open
    max_queued: int = 1024  # sequences
    patience_s: float | None = None  # with a step
    is_scripted: bool = False  # the model is FakeRunner, which notices every wrong block
    num_blocks: int = 64  # then
    pace_s: float = 0.0  # of its steps


class ScriptedRunner(FakeRunner):
    """A FakeRunner that takes its time."""

    def __init__(self, limits: RunnerLimits, pace_s: float) -> None:
        super().__init__(limits)
        self._pace_s = pace_s

    def launch(self, plan, fill_masks):
        time.sleep(self._pace_s)
        return super().launch(plan, fill_masks)


class WarmServer(main_module.DrainingServer):
    """Has the threads for large bodies from the start, so that one more is one too many."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        pool, barrier = ThreadPoolExecutor(NUM_THREADS), threading.Barrier(NUM_THREADS)
        asyncio.get_running_loop().set_default_executor(pool)
        await asyncio.gather(*(asyncio.to_thread(barrier.wait) for _ in range(NUM_THREADS)))
        await super().startup(sockets)


def redirect_errors(path: str) -> None:
    """Have standard error go to a file, or nowhere at all."""
    if path:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    else:
        reading, log = os.pipe()
        os.close(reading)
    os.dup2(log, 2)
    os.close(log)


def main() -> None:
    """Serve until a signal or a fault ends it."""
    options = Options(**json.loads(sys.stdin.readline()))
    redirect_errors(options.log)
    if options.max_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.max_files, options.max_files))
    command = parse(["serve", *options.arguments], read_environment())
    set_up_logging(command.server.log_level)
    if options.patience_s is not None:
        loop.FIRST_PATIENCE_S = loop.MIN_PATIENCE_S = options.patience_s
        engine_module.JOIN_TIMEOUT_S = options.patience_s
    settings = main_module._with_open_files(command.server)
    loader_module.available_threads = lambda: 1  # the other core is the clients'
    loaded = load_model(command.load)
    tokenizer = FaultyTokenizer(loaded.tokenizer)

    def text_of(token_ids: tuple[int, ...]) -> str:
        return b"".join(map(loaded.tokenizer.token_bytes, token_ids)).decode("utf-8", "replace")

    inner = loaded.runner
    if options.is_scripted:
        limits = dataclasses.replace(inner.limits, num_blocks=options.num_blocks)
        inner = ScriptedRunner(limits, options.pace_s)
    runner = FaultyRunner(inner, text_of)
    runner.tokenizer = tokenizer
    time.time = runner.clock
    BuggyScheduler.text_of, BuggyScheduler.had = staticmethod(text_of), set()
    engine_module.Scheduler = scheduler_module.Scheduler = BuggyScheduler
    loaded = dataclasses.replace(loaded, runner=runner, tokenizer=tokenizer)
    context = main_module.make_context(command, loaded)
    context.engine._admission = Admission(options.max_queued, 1 << 20)
    listener = main_module.bind(settings)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    server = WarmServer(
        EdgeConfig(create_app(context, settings), settings),
        context.engine,
        settings.shutdown_timeout_s,
    )
    server.run(sockets=[listener])
    sys.exit(1 if server.has_failed else 0)


if __name__ == "__main__":
    main()
