"""Watches the step loop from the event loop, and says when the process had better end.

A worker that has died and a step that hangs cannot be mended from inside: streams are told, stacks
go to the log, and whoever supervises the process starts a new one.
"""

import faulthandler
import logging
from enum import Enum, auto

from app.engine.client import EngineClient

logger = logging.getLogger(__name__)

STDERR = 2  # by number: it writes without the interpreter's help
GIVE_UP_AT = 3.0  # times the patience with a step
# The interpreter itself may be held: then only a timer of its own thread still runs.
HELD_TIMEOUT_S = 300.0


class Verdict(Enum):
    """What is to be done."""

    GO_ON = auto()
    LEAVE = auto()


class Watchdog:
    """Call `look` every moment; it is cheap."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._is_worried = False

    def look(self) -> Verdict:
        """Return whether the process can go on. Dumps all stacks once when a step is stuck."""
        faulthandler.dump_traceback_later(HELD_TIMEOUT_S, exit=True)
        if not self._engine.is_alive:
            logger.critical("the engine has died; the process ends")
            return Verdict.LEAVE
        stuck_for = self._engine.stuck_for
        if stuck_for < 1:
            self._is_worried = False
            return Verdict.GO_ON
        if not self._is_worried:
            self._is_worried = True
            logger.error("a step takes far too long; these are the stacks of all threads")
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
        if stuck_for < GIVE_UP_AT:
            return Verdict.GO_ON
        logger.critical("the step is given up; the process ends")
        self._engine.give_up("the engine hangs; the server starts again")
        return Verdict.LEAVE

    def stop(self) -> None:
        """Take back the last resort: the event loop ends, and is not held."""
        faulthandler.cancel_dump_traceback_later()
