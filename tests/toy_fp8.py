"""Toy checkpoints in fp8, in the forms that tools write; weights of `write_toy_checkpoint`."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.toy import write_json, write_toy_checkpoint

BLOCK = (32, 48)  # neither side of the toy's matrices divides by both


def compressed_tensors(strategy: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "model.layers.0.mlp.down_proj"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": strategy, **weights},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True},
            }
        },
    }


FORMS: dict[str, dict[str, Any]] = {
    "channel": compressed_tensors("channel"),
    "tensor": compressed_tensors("tensor"),
    "tensor, static": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head", "model.layers.0.mlp.down_proj"],
    },
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"},
}


def write_toy_fp8(folder: Path, form: str, **overrides: Any) -> Path:
    """Write a folder whose projections are in fp8, but for the first layer's `down_proj`."""
    dtype = torch.bfloat16
    write_toy_checkpoint(folder, dtype=dtype, quantization_config=FORMS[form], **overrides)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")]:
        if name == "model.layers.0.mlp.down_proj.weight":
            continue
        codes, scales = _quantize(state[name].float(), form)
        state[name] = codes
        scale_name = name + ("_scale_inv" if form == "block" else "_scale")
        state[scale_name] = scales.to(torch.float32 if form == "block" else dtype)
        if form == "tensor, static":
            state[name.replace("weight", "input_scale")] = torch.tensor([0.05])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _quantize(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales, which have been rounded to bfloat16 before they are used."""
    highest = weight.abs().amax()
    if form == "channel":
        highest = weight.abs().amax(-1, keepdim=True)
    elif form == "block":
        rows, columns = (math.ceil(size / n) for size, n in zip(weight.shape, BLOCK, strict=True))
        highest = torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = weight[i * BLOCK[0] :, j * BLOCK[1] :][: BLOCK[0], : BLOCK[1]]
                highest[i, j] = part.abs().amax()
    scales = (highest / 448 * 1.01).bfloat16().float()
    spread = scales
    if form == "block":
        spread = scales.repeat_interleave(BLOCK[0], 0)[: weight.shape[0]]
        spread = spread.repeat_interleave(BLOCK[1], 1)[:, : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scales if form != "tensor" else scales.view(1)


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None], **config: Any) -> None:
    """Change tensors of a folder, or remove them, and fields of its config.json."""
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text()), **config})
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
