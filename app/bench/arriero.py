"""This server as one of the peers, in the interpreter that runs the benchmark."""

import sys
from pathlib import Path

from app.bench.peer import MAX_MODEL_LEN, MAX_SEQUENCES, Launch, Model, Peer, PeerFault, Workplace


def arriero(name: str, bits: int, *flags: str) -> Peer:
    """Return this server with some flags of `arriero serve`."""

    def command(launch: Launch, workplace: Workplace) -> list[str]:
        # Not `-m app.cli`: that module is made to be called, as the console script does.
        entry = "from app.cli import main; main()"
        limits = ["--max-num-seqs", str(MAX_SEQUENCES), "--max-model-len", str(MAX_MODEL_LEN)]
        served = ["--served-model-name", "bench", "--port", str(launch.port)]
        start = [sys.executable, "-c", entry, "serve", str(launch.model)]
        return [*start, *limits, *served, *flags, *workplace.arriero_args]

    return Peer(name=name, bits=bits, prepare=_prepare, command=command, is_ours=True)


def _prepare(model: Model, _workplace: Workplace) -> Path:
    source = model.gguf or model.checkpoint
    if source is None:
        raise PeerFault("the model has neither a GGUF file nor a checkpoint")
    return source


ARRIERO = (
    arriero("arriero float32", 32, "--dtype", "float32"),
    arriero("arriero int8", 8, "--quantization", "int8"),
    arriero("arriero int4", 4, "--quantization", "int4"),
)
