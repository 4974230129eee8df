"""Hugging Face folders: the same tensors as transformers reads, and every lie of a header refused.

Real weights are those of stories260K, where it can be had.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import GenerationDefaults, LoadOptions
from model.errors import ConfigError, ModelError, WeightsError
from model.weights.checkpoint import Checkpoint, open_checkpoint
from model.weights.safetensors import read_header
from tests.toy import VARIANTS, toy_config, toy_state, write_json, write_toy_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def open_folder(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(LoadOptions(model=str(folder), **options))


def refusal_of(folder: Path) -> str:
    """The one line with which a folder is refused, paths relative to the folder."""
    with pytest.raises(ModelError) as refusal:
        open_folder(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value).replace(f"{folder}/", "").replace(str(folder), "folder")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_equal_those_of_transformers(variant: str, shards: int, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = write_toy_checkpoint(tmp_path, shards=shards, tokenizer=False, **VARIANTS[variant])
    theirs = LlamaForCausalLM.from_pretrained(folder).state_dict()
    if VARIANTS[variant].get("tie_word_embeddings"):
        del theirs["lm_head.weight"]
    checkpoint = open_folder(folder)
    assert set(checkpoint.tensor_names()) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = open_folder(write_toy_checkpoint(tmp_path, dtype=dtype))
    assert torch.equal(checkpoint.read(Q_PROJ), toy_state(toy_config())[Q_PROJ].to(dtype))
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")


def test_stored_dtype_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path, dtype=torch.bfloat16, torch_dtype=None)
    assert open_folder(folder).config.dtype == "bfloat16"


def test_real_model_opens_and_reads(stories260k: Path) -> None:
    checkpoint = open_folder(stories260k)
    expected = load_file(stories260k / "model.safetensors")
    assert checkpoint.config.num_parameters == 260_032
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.num_bytes == 260_032 * 4
    assert checkpoint.packed(Q_PROJ) is None
    for name in checkpoint.tensor_names():
        assert torch.equal(checkpoint.read(name), expected[name]), name


def test_tensor_stays_valid_after_close(tmp_path: Path) -> None:
    checkpoint = open_folder(write_toy_checkpoint(tmp_path))
    norm = checkpoint.read("model.norm.weight")
    checkpoint.close()
    assert torch.equal(norm, toy_state(toy_config())["model.norm.weight"])
    with pytest.raises(WeightsError, match="was read from after it was closed"):
        checkpoint.read("model.norm.weight")


def test_writing_into_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    file = write_toy_checkpoint(tmp_path) / "model.safetensors"
    before = file.read_bytes()
    open_folder(tmp_path).read("model.norm.weight").zero_()
    assert file.read_bytes() == before


def test_data_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path)
    header, tensors = split(folder / "model.safetensors")
    rewrite(folder, header, tensors, pad_to=3)
    assert torch.equal(open_folder(folder).read(Q_PROJ), toy_state(toy_config())[Q_PROJ])


def test_ends_of_text_are_the_union_of_both_configs(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path, eos_token_id=[0, 3])
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 7], "top_p": 0.9})
    checkpoint = open_folder(folder)
    assert checkpoint.config.eos_token_ids == (0, 3)
    assert checkpoint.eos_token_ids == (0, 3, 7)


def test_generation_config_is_the_models_or_vllms(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path)
    write_json(folder / "generation_config.json", {"temperature": 0.6, "eos_token_id": 7})
    assert open_folder(folder).generation == GenerationDefaults(temperature=0.6)
    ours = open_folder(folder, generation_config="vllm")
    assert ours.generation == GenerationDefaults()
    assert ours.eos_token_ids == (0, 7)


def test_tables_of_old_checkpoints_are_no_surprise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_extra(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert open_folder(tmp_path).config.num_layers == 2
    assert caplog.records == []


def test_unknown_tensor_is_logged_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_extra(tmp_path, "model.layers.0.self_attn.q_norm.weight")
    assert len(open_folder(tmp_path).tensor_names()) == 21
    assert "1 tensors are not part of a Llama of this config" in caplog.text
    assert "model.layers.0.self_attn.q_norm.weight" in caplog.text


def with_extra(folder: Path, name: str) -> None:
    write_toy_checkpoint(folder)
    state = load_file(folder / "model.safetensors")
    save_file({**state, name: torch.ones(8)}, folder / "model.safetensors")


def test_fingerprint_tells_headers_and_configs_apart(tmp_path: Path) -> None:
    same = [open_folder(write_toy_checkpoint(tmp_path / at)).fingerprint for at in ("a", "b")]
    other = open_folder(write_toy_checkpoint(tmp_path / "c", rope_theta=20000.0)).fingerprint
    sharded = open_folder(write_toy_checkpoint(tmp_path / "d", shards=2)).fingerprint
    assert same[0] == same[1]
    assert len({same[0], other, sharded}) == 3
    assert len(other) == 16


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a file."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rewrite(folder: Path, header: object, tensors: bytes, pad_to: int = 8) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8 + (pad_to if pad_to != 8 else 0))
    raw = struct.pack("<Q", len(text)) + text + tensors
    (folder / "model.safetensors").write_bytes(raw)


def toy_header(folder: Path) -> tuple[dict[str, Any], bytes]:
    return split(write_toy_checkpoint(folder, tokenizer=False) / "model.safetensors")


def test_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    state = load_file(write_toy_checkpoint(tmp_path) / "model.safetensors")
    del state[Q_PROJ]
    save_file(state, tmp_path / "model.safetensors")
    assert refusal_of(tmp_path) == f"folder: tensor {Q_PROJ} is missing"


def test_misshapen_tensor_is_refused_by_file_and_name(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, shards=2)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {"intermediate_size": 161})
    assert refusal_of(tmp_path) == (
        "model-00001-of-00002.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight' "
        "has shape [160, 64], not [161, 64]"
    )


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    state = load_file(write_toy_checkpoint(tmp_path) / "model.safetensors")
    save_file({**state, Q_PROJ: state[Q_PROJ].to(torch.int8)}, tmp_path / "model.safetensors")
    assert refusal_of(tmp_path) == (
        f"model.safetensors: tensor '{Q_PROJ}' is stored as I8, which is not supported"
    )


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (write_toy_checkpoint(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    assert refusal_of(tmp_path) == (
        f"model-00002-of-00003.safetensors: is missing, but {INDEX} names it"
    )


def test_tensor_that_the_index_puts_in_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    index = json.loads((write_toy_checkpoint(tmp_path, shards=2) / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q_PROJ] = next(
        file for file in files if file != index["weight_map"][Q_PROJ]
    )
    write_json(tmp_path / INDEX, index)
    assert refusal_of(tmp_path).endswith(f".safetensors: tensor '{Q_PROJ}' is missing")


def test_tensor_that_is_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    assert refusal_of(tmp_path).endswith("is in another file as well")


@pytest.mark.parametrize(
    "filename",
    ["../other/model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..\\x", 7],
)
def test_index_that_leaves_the_folder_is_refused(filename: object, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "other")
    folder = write_toy_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_PROJ] = filename
    write_json(folder / INDEX, index)
    assert refusal_of(folder) == f"{INDEX}: {filename!r} is not the name of a file in the folder"


@pytest.mark.parametrize("filename", ["pytorch_model.bin", "..", ""])
def test_index_may_name_safetensors_only(filename: str, tmp_path: Path) -> None:
    index = json.loads((write_toy_checkpoint(tmp_path, shards=2) / INDEX).read_text())
    index["weight_map"][Q_PROJ] = filename
    write_json(tmp_path / INDEX, index)
    assert refusal_of(tmp_path) == f"{INDEX}: {filename!r} is not a safetensors file"


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_index_without_a_map_is_refused(weight_map: object, tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, shards=2)
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    assert refusal_of(tmp_path) == f"{INDEX}: weight_map must be an object that names files"


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = write_toy_checkpoint(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "truncated" in refusal_of(tmp_path)


def test_header_of_absurd_length_is_refused(tmp_path: Path) -> None:
    file = write_toy_checkpoint(tmp_path) / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    assert refusal_of(tmp_path) == (
        "model.safetensors: is truncated or no safetensors file: "
        f"its header would be {2**60} bytes long, the file is {len(raw)}"
    )


ENTRY_REFUSALS: dict[str, tuple[object, str]] = {
    "size": (
        {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 256]},
        f"tensor 'x': F32 [{2**60}, {2**60}] takes {2**122} bytes, not 256",
    ),
    "end": (
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        f"tensor 'x': ends at byte {2**42}, but the file holds 256; it is truncated",
    ),
    "hole": (
        {"dtype": "F32", "shape": [63], "data_offsets": [4, 256]},
        "tensor 'x' begins at byte 4, expected 0",
    ),
    "rest": ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "252 bytes after the last"),
    "backwards": ({"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}, "malformed header"),
    "negative": ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 256]}, "malformed header"),
    "bool": ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "malformed header"),
    "float": ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "malformed header"),
    "three": ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "malformed header"),
    "dimensions": (
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        "malformed header",
    ),
    "list": ([], "tensor 'x': has a malformed header entry: []"),
}


@pytest.mark.parametrize("case", ENTRY_REFUSALS)
def test_entry_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    entry, message = ENTRY_REFUSALS[case]
    rewrite(tmp_path, {"__metadata__": {"format": "pt"}, "x": entry}, bytes(256))
    with pytest.raises(WeightsError) as refusal:
        read_header(tmp_path / "model.safetensors")
    assert str(refusal.value).startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert message in str(refusal.value)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}
    rewrite(tmp_path, {"x": entry, "y": entry}, bytes(256))
    with pytest.raises(WeightsError, match="tensor 'y' begins at byte 0, expected 256"):
        read_header(tmp_path / "model.safetensors")


def test_every_flipped_bit_of_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path, tokenizer=False, num_hidden_layers=1)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for at in range(0, end, 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 7
        file.write_bytes(flipped)
        try:
            checkpoint = open_folder(folder)
        except ModelError:
            refused += 1
        else:
            checkpoint.read(Q_PROJ)
    assert refused > 0.9 * end / 3


def test_pickles_alone_are_refused(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal_of(folder) == (
        "folder: has its weights only in pytorch_model.bin, a pickle, which could run code; "
        "convert them to safetensors"
    )


def test_custom_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = write_toy_checkpoint(
        tmp_path / "model",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    )
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    assert refusal_of(folder) == "config.json: auto_map asks for custom code, which is never run"
    assert not marker.exists()


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    (write_toy_checkpoint(tmp_path, shards=2) / INDEX).unlink()
    assert refusal_of(tmp_path) == f"folder: has 2 safetensors files but no {INDEX}"


def test_absurd_config_is_refused_before_weights_are_looked_at(tmp_path: Path) -> None:
    folder = write_toy_checkpoint(tmp_path, tokenizer=False)
    (folder / "model.safetensors").write_bytes(b"")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"vocab_size": 2**40})
    with pytest.raises(ConfigError, match="vocab_size must be from 1 to"):
        open_folder(folder)
