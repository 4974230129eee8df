"""Servers under test: `arriero serve` as a process of its own, with weights of several kinds."""

import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.toy import write_toy_checkpoint

START_S = 180
KEY = "secret-of-the-checks"
ARRIERO = Path(sys.executable).with_name("arriero")
# The demo model; random weights, with calls in each of the three forms.
FLAVOURS = {
    "demo": (),
    "toy": ("--tool-call-parser", "hermes"),
    "toy-llama3": ("--tool-call-parser", "llama3_json"),
    "toy-pythonic": ("--tool-call-parser", "pythonic"),
}


def flags_of(flavour: str, scratch: Path) -> list[str]:
    """Return the arguments of a flavour, its weights written to `scratch` if they are random."""
    model: list[str] = []
    if flavour != "demo":
        folder = scratch / "toy"
        if not folder.is_dir():
            write_toy_checkpoint(folder, max_position_embeddings=8192)
        model = [str(folder)]
    return [*model, *FLAVOURS[flavour], "--max-num-seqs", "4"]


@contextmanager
def serving(flags: list[str], log: Path) -> Iterator[str]:
    """Run a server until the block ends; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [ARRIERO, "serve", *flags, "--port", str(port), "--api-key", KEY]
    command += ["--served-model-name", "model", "--shutdown-timeout", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ))
        try:
            _wait_until_ready(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    pause = threading.Event()
    for _ in range(START_S * 5):
        if process.poll() is not None:
            break
        if _is_ready(port):
            return
        pause.wait(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text('utf-8', 'replace')}")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
