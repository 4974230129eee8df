"""The server that live cases share, and what must hold of it after every one of them."""

import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from tests.battery.base_line import BaseLine, warm_up
from tests.battery.client import KEY, OTHER_KEY, Server, Starter, Vitals, running
from tests.toy import write_toy_checkpoint

NUM_BLOCKS = 96
BYTES_PER_TOKEN = 256  # of the toy's K/V
Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session", autouse=True)
def open_files() -> Iterator[None]:
    """Let this process have as many sockets as the floods need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("battery") / "toy")


@pytest.fixture(scope="session")
def arguments(toy: Path) -> list[str]:
    """The command line of the server that is attacked: what is shipped, with shorter deadlines."""
    keys = toy.parent / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{KEY}"\n[bob]\nkey = "{OTHER_KEY}"\n')
    kv_bytes = NUM_BLOCKS * 16 * BYTES_PER_TOKEN
    flags = {
        "--served-model-name": "toy",
        "--device": "cpu",
        "--quantization": "int8",
        "--kv-cache-dtype": "float16",
        "--kv-cache-memory-bytes": kv_bytes,
        "--max-num-seqs": 16,
        "--api-key-file": keys,
        "--header-timeout": 2,
        "--body-timeout": 2,
        "--shutdown-timeout": 2,
    }
    return [str(toy), *(str(part) for pair in flags.items() for part in pair)]


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture
def start(starter: Starter, arguments: list[str], tmp_path: Path) -> Start:
    """Start servers of a case's own: `start(flags=[...], **options)`."""
    numbers = count()

    def start_one(*, flags: tuple[str, ...] = (), log: Path | None = None, **options):
        log = tmp_path / f"log-{next(numbers)}" if log is None else log
        return running(starter, [*arguments, *flags], log, **options)

    return start_one


class Shared:
    """The server of all live cases; a new one if a case has ended it."""

    def __init__(self, open_server: Callable[[], AbstractContextManager[Server]]) -> None:
        self._open = open_server
        self._stack = ExitStack()
        self._server: Server | None = None
        self.reference: list[int] = []  # what the canary says
        self.at_start: Vitals

    def get(self) -> Server:
        if self._server is not None and self._server.process.poll() is None:
            return self._server
        self.close()
        self._server = self._stack.enter_context(self._open())
        warm_up(self._server)
        reference = self._server.canary()
        assert not self.reference or reference == self.reference
        self.reference = reference
        self.at_start = self._server.vitals_at_rest()
        return self._server

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def shared(
    starter: Starter, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    log = tmp_path_factory.mktemp("battery-log") / "log"
    shared = Shared(partial(running, starter, arguments, log, max_queued=128))
    yield shared
    shared.close()


@pytest.fixture
def live(shared: Shared) -> Iterator[Server]:
    """The shared server, which must be as well after a case as before."""
    server = shared.get()
    server.exchanges.clear()
    base_line = BaseLine(shared.reference, shared.at_start, server.vitals().resident)
    yield server
    base_line.check(server)


class Trap:
    """A port of the loopback that nobody may connect to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def num_connections(self) -> int:
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return 0
        return 1

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()
