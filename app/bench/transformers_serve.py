"""`transformers serve`, the reference most people know, in bfloat16 and in float32.

It takes texts, not ids: the words of the shapes' vocabulary map one to one. With its continuous
batching, without which its requests run one after another.
"""

import json
from pathlib import Path

from app.bench.peer import (
    CAPACITY_TOKENS,
    Environment,
    Launch,
    Model,
    Peer,
    PeerFault,
    WireRequest,
    Workplace,
)
from app.bench.shapes import words

_ENVIRONMENT = Environment(
    name="transformers",
    requirements=("transformers[serving]==5.23.0", "torch==2.13.0", "accelerate"),
)
_WORDS = tuple(words())


def transformers_serve(name: str, bits: int, dtype: str) -> Peer:
    """Return the peer at one precision."""

    def command(launch: Launch, workplace: Workplace) -> list[str]:
        program = workplace.python_of(_ENVIRONMENT).with_name("transformers")
        start = ["env", "HF_HUB_OFFLINE=1", f"OMP_NUM_THREADS={launch.num_threads}", str(program)]
        start += ["serve", str(launch.model), "--device", "cpu", "--dtype", dtype]
        start += ["--continuous-batching", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
        start += ["--cb-num-blocks", str(CAPACITY_TOKENS // 32)]
        return [*start, "--host", "127.0.0.1", "--port", str(launch.port)]

    return Peer(name=name, bits=bits, prepare=_prepare, command=command, request=_request)


def _prepare(model: Model, workplace: Workplace) -> Path:
    if model.checkpoint is None:
        raise PeerFault("not run: it takes texts, and random ids of a real vocabulary have none")
    workplace.python_of(_ENVIRONMENT)
    return model.checkpoint


def _request(model: Path, ids: list[int], num_output: int) -> WireRequest:
    generation = {"max_new_tokens": num_output, "min_new_tokens": num_output, "do_sample": False}
    body: dict[str, object] = {
        "model": str(model),
        "prompt": "".join(_WORDS[index] for index in ids),
        "max_tokens": num_output,
        "stream": True,
        "generation_config": json.dumps(generation),
    }
    return WireRequest(path="/v1/completions", body=body)


TRANSFORMERS = (
    transformers_serve("transformers serve bf16", 16, "bfloat16"),
    transformers_serve("transformers serve float32", 32, "float32"),
)
