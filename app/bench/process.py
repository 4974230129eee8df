"""A server as a process tree: started on a free port, weighed, and ended with all its children."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import httpx

from app.bench.peer import PeerFault

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0
CPU_CLOCK = 2  # CPUCLOCK_SCHED of Linux


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def last_line(log: Path) -> str:
    """Return what a log ends with: of an exception, its message."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no word in its log")[:300]


class ServerProcess:
    """Runs a command in a session of its own for as long as the context is open."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self.started_s = 0.0

    def __enter__(self) -> "ServerProcess":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self.started_s = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal_all(signal.SIGKILL)
            self._process.wait()
        # What the server left running would take part in the next one's turn.
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    async def wait_ready(self, client: httpx.AsyncClient, path: str) -> None:
        """Poll until the server answers 200. Raises PeerFault when it ends or takes too long."""
        reason = "its port answers, but not with 200"
        while time.monotonic() < self.started_s + READY_TIMEOUT_S:
            status = self._process.poll()
            if status is not None:
                raise PeerFault(f"ended with {status} at its start: {last_line(self._log)}")
            try:
                if (await client.get(path, timeout=5.0)).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}"
            # A busy wait would take cores from what is timed.
            await asyncio.sleep(0.02)
        raise PeerFault(f"not ready after {READY_TIMEOUT_S:.0f} s: {reason}")

    def resident_bytes(self) -> int:
        """Return the memory of the whole tree; pages that its processes share count once."""
        return sum(_proportional_bytes(pid) for pid in _tree(self._process.pid))

    def cpu_seconds(self) -> float:
        """Return the CPU time that the whole tree has used, of what is still there."""
        return sum(_cpu_seconds(pid) for pid in _tree(self._process.pid))


def _cpu_seconds(pid: int) -> float:
    # The clock of another process, as clock_getcpuclockid(3) names it: /proc counts in hundredths.
    try:
        return time.clock_gettime(~pid << 3 | CPU_CLOCK)
    except OSError:
        return 0.0  # the process has ended


def _tree(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                pids += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # a thread that ended while it was looked at
    return pids


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0  # the process has ended
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0")
    return int(line.split()[1]) * 1024
