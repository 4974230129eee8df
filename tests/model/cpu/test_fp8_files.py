"""FP8 checkpoints on a CPU: the native step computes with what the codes stand for."""

import random

import pytest
import torch
from safetensors.torch import save_file

from model.config import LoadOptions
from model.cpu.library import Library
from model.loader import load_model
from model.step import SamplingParams
from model.weights.checkpoint import open_checkpoint
from tests.model.cpu.drive import load_native
from tests.model.drive import logits_alone
from tests.model.test_runner import request, serve, tokens
from tests.toy import write_toy_checkpoint
from tests.toy_fp8 import FORMS, write_toy_fp8


def write_twin(folder, of):
    """Write a float32 checkpoint of the values in an FP8 one."""
    checkpoint = open_checkpoint(LoadOptions(model=str(of)))
    write_toy_checkpoint(folder)
    state = {name: checkpoint.read(name).float().clone() for name in checkpoint.tensor_names()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_logits_are_those_of_the_values(form, quantization, tmp_path, library: Library):
    folder = write_toy_fp8(tmp_path / "fp8", form)
    twin = write_twin(tmp_path / "twin", folder)
    config, network = load_native(folder, library, quantization)
    twin_config, twin_network = load_native(twin, library, quantization)
    rng = random.Random(0)
    prompt = [rng.randrange(config.vocab_size) for _ in range(30)]
    got = logits_alone(config, network, prompt)
    assert torch.equal(got, logits_alone(twin_config, twin_network, prompt))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}], ids=str)
def test_fp8_file_is_served(options, tmp_path, library_path):
    folder = write_toy_fp8(tmp_path / "fp8", "channel")
    cache = str(library_path.parents[1])
    progress = []
    loaded = load_model(
        LoadOptions(model=str(folder), device="cpu", cache_dir=cache, **options),
        lambda done, size: progress.append((done, size)),
    )
    assert progress[-1][0] == progress[-1][1]
    outputs, _ = serve(
        loaded.runner,
        [request("a", list(range(5, 25)), SamplingParams(temperature=0.0, max_tokens=4))],
    )
    assert [len(tokens(each)) for each in outputs.values()] == [4]
