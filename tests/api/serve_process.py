"""A process with the server's own logging, socket and signals, and an engine that says little.

`python -m tests.api.serve_process LOG_LEVEL DRAIN_S LOG_FORMAT` writes its port; signals end it.
"""

import asyncio
import sys

from app.api.connections import EdgeConfig
from app.factory import create_app
from app.logs import set_up_logging
from app.main import DrainingServer, bind
from app.settings import ServerSettings
from tests.fake_engine import FakeEngine, make_context, says


class StubbornEngine(FakeEngine):
    """Says nothing, and has not finished before its time is up."""

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True
        await asyncio.sleep(timeout_s)


def main() -> None:
    level, drain_s, log_format = sys.argv[1:]
    settings = ServerSettings(
        port=0, api_keys=("secret",), log_level=level, shutdown_timeout_s=float(drain_s)
    )
    set_up_logging(settings.log_level, "json" if log_format == "json" else "text")
    engine = StubbornEngine(says("x"))
    engine.gate.clear()
    app = create_app(make_context(engine), settings)
    listener = bind(settings)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = EdgeConfig(app, settings)
    DrainingServer(config, engine, settings.shutdown_timeout_s).run(sockets=[listener])


if __name__ == "__main__":
    main()
