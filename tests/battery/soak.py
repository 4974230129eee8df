"""A soak: mixed load, random aborts and injected faults for minutes; memory flat, no answer wrong.

scripts/soak                    ten minutes
scripts/soak --minutes 60
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from tests.battery.client import KEY, OTHER_KEY, Server, Starter, running
from tests.battery.load import MixedLoad
from tests.toy import write_toy_checkpoint

MAX_GROWTH = 16 << 20  # of the resident memory, between the second fifth and the last
SAMPLE_S = 5.0
NUM_CLIENTS = 8


class Soak:
    """Clients that go on until they are told to stop, and what was seen of the server meanwhile."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._numbers = count()
        self._load = MixedLoad(server, seed=22)
        self._is_over = threading.Event()
        self.faults: list[str] = []
        self.resident: list[int] = []

    @property
    def num_answers(self) -> int:
        return sum(self._load.num_of.values())

    @property
    def kinds(self) -> str:
        return ", ".join(f"{kind} {number}" for kind, number in sorted(self._load.num_of.items()))

    def run(self, seconds: float) -> None:
        """Load the server for so long, then wait until nothing is left to do."""
        self._is_over.clear()
        self.resident.clear()
        deadline_s = time.monotonic() + seconds
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for _ in range(NUM_CLIENTS):
                pool.submit(self._work)
            while (left_s := deadline_s - time.monotonic()) > 0:
                self._is_over.wait(min(SAMPLE_S, left_s))
                self.resident.append(self._server.vitals().resident)
            self._is_over.set()
        self._server.wait(self._server.is_idle)

    def _work(self) -> None:
        while not self._is_over.is_set():
            number = next(self._numbers)
            try:
                self._load.one(number)
                self._server.check_nothing_leaked()
            except Exception as error:
                self.faults.append(f"{number}: {type(error).__name__}: {error}"[:300])
            self._server.exchanges.clear()

    @property
    def growth(self) -> int:
        """Bytes between the medians of the second fifth of the samples and of the last."""
        fifth = max(1, len(self.resident) // 5)
        early, late = self.resident[fifth : 2 * fifth], self.resident[-fifth:]
        return int(statistics.median(late) - statistics.median(early or late))


def start_arguments(folder: Path) -> list[str]:
    """Write a toy checkpoint and a key file; return the command line over them."""
    toy, keys = write_toy_checkpoint(folder / "toy"), folder / "keys.toml"
    keys.write_text(f'[alice]\nkey = "{KEY}"\n[bob]\nkey = "{OTHER_KEY}"\n')
    flags = ["--served-model-name", "toy", "--device", "cpu", "--quantization", "int8"]
    flags += ["--kv-cache-dtype", "float16", "--kv-cache-memory-bytes", str(96 * 16 * 256)]
    return [str(toy), *flags, "--max-num-seqs", "16", "--api-key-file", str(keys)]


def main() -> int:
    """Run, print what was seen; exit code 1 if an answer was wrong or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    starter = Starter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = start_arguments(folder)
        with running(starter, arguments, folder / "log") as server:
            starter.close()
            soak = Soak(server)
            soak.run(5)  # what is made once is made
            before = server.vitals_at_rest()
            soak.run(60 * args.minutes)
            view = server.engine()
            after = server.vitals_at_rest()
    lines = [
        f"{args.minutes:g} minutes, {soak.num_answers:,} requests, {len(soak.faults)} wrong",
        soak.kinds,
        f"resident: {before.resident >> 20} MiB before, {after.resident >> 20} after; "
        f"{soak.growth / 2**20:+.1f} MiB from the second fifth of the time to the last",
        f"files {before.num_files} -> {after.num_files}, threads {before.num_threads} -> "
        f"{after.num_threads}, free blocks {view['num_free_blocks']} of {view['num_blocks']}",
        *soak.faults[:20],
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    is_well = not soak.faults and soak.growth < MAX_GROWTH
    is_well &= after.num_threads <= before.num_threads and after.num_files <= before.num_files
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
