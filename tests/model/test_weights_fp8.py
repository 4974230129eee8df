"""FP8 checkpoints: read with their own scales, dequantised where nothing multiplies fp8."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from model.config import LoadOptions
from model.errors import ModelError
from model.weights.checkpoint import Checkpoint, open_checkpoint
from tests.toy import toy_config, toy_state
from tests.toy_fp8 import BLOCK, FORMS, compressed_tensors, rewrite, write_toy_fp8

QUERY = "model.layers.1.self_attn.q_proj.weight"
IGNORED = "model.layers.0.mlp.down_proj.weight"


def open_folder(folder) -> Checkpoint:
    return open_checkpoint(LoadOptions(model=str(folder)))


@pytest.mark.parametrize("form", FORMS)
def test_matrices_come_back_within_a_sixteenth(form, tmp_path):
    checkpoint = open_folder(write_toy_fp8(tmp_path, form))
    state = toy_state(toy_config())
    for name in checkpoint.tensor_names():
        tensor, expected = checkpoint.read(name), state[name].bfloat16()
        if name.endswith("_proj.weight") and name != IGNORED:
            assert tensor.dtype is torch.float32
            smallest = expected.float().abs().amax() * 1.01 / 448 * 2**-9
            bound = expected.float().abs() / 16 + smallest
            assert ((tensor - expected.float()).abs() <= bound).all(), name
        else:
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_files_own_but_for_blocks(form, tmp_path):
    folder = write_toy_fp8(tmp_path, form)
    fp8 = open_folder(folder).fp8
    assert fp8.rows(IGNORED) is None
    assert fp8.rows("lm_head.weight") is None
    rows = fp8.rows(QUERY)
    if form == "block":
        assert rows is None
        return
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(rows.codes.view(torch.uint8), stored[QUERY].view(torch.uint8))
    assert rows.scales.shape == (64, 1)
    assert torch.equal(rows.codes.float() * rows.scales, fp8.read(QUERY))


def test_block_scales_reach_the_edges(tmp_path):
    folder = write_toy_fp8(tmp_path, "block")
    stored = load_file(folder / "model.safetensors")
    got = open_folder(folder).read(QUERY)
    scales = stored[QUERY + "_scale_inv"]
    assert scales.shape == (2, 2)
    for row, column in ((0, 0), (31, 47), (32, 47), (31, 48), (63, 63)):
        scale = scales[row // BLOCK[0], column // BLOCK[1]]
        assert got[row, column] == stored[QUERY][row, column].float() * scale


def test_static_scales_of_activations_are_left_aside_with_a_word(tmp_path, caplog):
    folder = write_toy_fp8(tmp_path, "tensor, static")
    with caplog.at_level(logging.INFO):
        checkpoint = open_folder(folder)
    assert "13 static scales of activations are not used" in caplog.text
    assert "not part of a Llama" not in caplog.text
    assert set(checkpoint.store.infos) == set(checkpoint.tensor_names())


@pytest.mark.parametrize(
    "names",
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ],
)
def test_scales_of_keys_and_values_are_read(names, tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    prefix = "model.layers.1."
    changes = {
        prefix + name: torch.tensor([scale]) for name, scale in zip(names, (0.5, 0.25), strict=True)
    }
    rewrite(folder, changes)
    assert open_folder(folder).fp8.kv_scales() == [(1.0, 1.0), (0.5, 0.25)]


def test_one_scale_for_keys_and_values_is_both(tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {"model.layers.0.self_attn.kv_scale": torch.tensor(0.125)})
    assert open_folder(folder).fp8.kv_scales() == [(0.125, 0.125), (1.0, 1.0)]


@pytest.mark.parametrize("scale", [torch.tensor(0.0), torch.tensor(torch.nan), torch.ones(2)])
def test_what_is_no_scale_of_keys_is_refused(scale, tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {"model.layers.0.self_attn.k_scale": scale})
    with pytest.raises(ModelError, match="k_scale"):
        open_folder(folder).fp8.kv_scales()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "q_proj.weight_scale is missing"),
        (torch.ones(7, 1), "its scales are float32"),
        (torch.ones(1, 64), "its scales are float32"),
        (torch.ones(64, dtype=torch.int32), "its scales are I32"),
    ],
)
def test_matrix_without_fitting_scales_is_refused(scales, message, tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {QUERY + "_scale": scales})
    with pytest.raises(ModelError, match=message):
        open_folder(folder)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {QUERY + "_scale": torch.full((64, 1), torch.inf)})
    with pytest.raises(ModelError, match="is not finite"):
        open_folder(folder).read(QUERY)


def test_vector_in_fp8_is_refused(tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match="is stored as F8_E4M3, which is not supported"):
        open_folder(folder)


def test_embedding_in_fp8_is_read_as_well_and_names_no_dtype(tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    embedding = toy_state(toy_config())["model.embed_tokens.weight"]
    codes = (embedding * 32).to(torch.float8_e4m3fn)
    scale = torch.tensor(1 / 32)
    changes = {"model.embed_tokens.weight": codes, "model.embed_tokens.weight_scale": scale}
    rewrite(folder, changes, torch_dtype=None)
    checkpoint = open_folder(folder)
    assert checkpoint.config.dtype == "float32"
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), codes.float() / 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "asks for 'awq', not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "only e4m3 is read"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "must be two sizes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "only FP8 is read"),
        ({**compressed_tensors("channel"), "format": "pack-quantized"}, "only float-quantized"),
        (compressed_tensors("channel", type="int"), "only fp8 is read"),
        (compressed_tensors("channel", num_bits=4), "only fp8 is read"),
        (compressed_tensors("group"), "not tensor, channel or block"),
        (compressed_tensors("block", block_structure="128x128"), "must be two sizes"),
        ({**compressed_tensors("channel"), "config_groups": {}}, "holds 0 kinds"),
        ({**compressed_tensors("channel"), "config_groups": {"group_0": {}}}, "is missing"),
        ({**compressed_tensors("channel"), "config_groups": 3}, "must be an object"),
    ],
)
def test_other_schemes_are_refused(config, message, tmp_path):
    folder = write_toy_fp8(tmp_path, "channel")
    rewrite(folder, {}, quantization_config=config)
    with pytest.raises(ModelError, match=message):
        open_folder(folder)
