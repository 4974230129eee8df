"""What must hold of a server after a case as before it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.battery.client import CANARY, PATIENCE_S, Server, Vitals

MAX_GROWTH = 96 << 20  # of the resident memory over one case
MAX_GROWTH_IN_ALL = 384 << 20  # with 128 compiled grammars


def warm_up(server: Server) -> None:
    """Have everything that is made once made: memory for large bodies, the grammars."""
    reference = server.canary()
    long_text = CANARY * 2000
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: server.complete(long_text), range(64)))
    assert server.chat("hi", response_format={"type": "json_object"}).status == 200
    server.wait(server.is_idle)
    assert server.canary() == reference  # now from the prefix cache


@dataclass(frozen=True)
class BaseLine:
    """What a server says and holds when it is well and has nothing to do."""

    reference: list[int]  # what the canary says
    at_start: Vitals  # at rest
    resident: int  # before the case

    def check(self, server: Server, timeout_s: float = PATIENCE_S) -> None:
        """Raise AssertionError unless the server is as well, and has said nothing that it may not.

        What is just being closed is waited for.
        """
        start = self.at_start
        assert server.process.poll() is None, f"has ended: {server.log_text()[-3000:]}"
        assert server.get("/health", key=None).status == 200, "is not healthy"
        assert server.canary() == self.reference, "the canary sings another song"
        server.wait(server.is_idle, timeout_s, "blocks or requests are left")
        server.wait(lambda: server.vitals().num_files <= start.num_files, timeout_s, "open files")
        server.wait(lambda: server.num_lasting_threads() <= start.num_threads, timeout_s, "threads")
        after = server.vitals()
        assert after.num_children <= start.num_children, "a child process is left"
        growth = after.resident - self.resident
        growth_in_all = after.resident - start.resident
        assert growth < MAX_GROWTH, f"memory grew by {growth >> 20} MiB"
        assert growth_in_all < MAX_GROWTH_IN_ALL, f"memory grew by {growth_in_all >> 20} MiB in all"
        server.check_nothing_leaked()
