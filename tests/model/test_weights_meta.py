"""Meta's folders: shards joined, rows reordered, params.json read; nothing is unpickled."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import LoadOptions, RopeConfig
from model.errors import ConfigError, ModelError, WeightsError
from model.weights.checkpoint import Checkpoint, open_checkpoint
from model.weights.meta import config_from_meta
from model.weights.tensors import interleaved_to_halves
from tests.toy import (
    META_VARIANTS,
    META_VOCAB_SIZE,
    VARIANTS,
    toy_config,
    toy_state,
    write_json,
    write_toy_meta,
)

WHERE = "toy/params.json"

# The params.json of Meta's releases.
LLAMA_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}
LLAMA_2_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA_3_1_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B,
    "dim": 2048,
    "n_layers": 16,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
}


def open_folder(folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(LoadOptions(model=str(folder), **options))


def refusal_of(folder: Path) -> str:
    with pytest.raises(ModelError) as refusal:
        open_folder(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value).replace(f"{folder}/", "").replace(str(folder), "folder")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("variant", META_VARIANTS)
def test_tensors_are_those_of_the_hugging_face_form(
    variant: str, shards: int, tmp_path: Path
) -> None:
    overrides = {"vocab_size": META_VOCAB_SIZE, "intermediate_size": 192, **VARIANTS[variant]}
    checkpoint = open_folder(write_toy_meta(tmp_path, shards=shards, **VARIANTS[variant]))
    expected = toy_state(toy_config(**overrides))
    assert checkpoint.load_format == "meta"
    assert set(checkpoint.tensor_names()) == set(expected)
    assert checkpoint.num_bytes >= sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_reordered_rows_rotate_as_metas_complex_pairs() -> None:
    """Scores of Meta's rotation on its rows equal those of Hugging Face's on ours."""
    heads, head_dim, positions = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, heads * head_dim, 16, generator=generator)
    hidden = torch.randn(positions, 16, generator=generator)
    angles = torch.outer(
        torch.arange(positions), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    )

    def metas(rows: torch.Tensor) -> torch.Tensor:
        pairs = (hidden @ rows.T).view(positions, heads, head_dim // 2, 2)
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones(()), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def ours(rows: torch.Tensor) -> torch.Tensor:
        x = (hidden @ interleaved_to_halves(rows, heads).T).view(positions, heads, head_dim)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    theirs_scores = torch.einsum("qhd,khd->hqk", metas(weight[0]), metas(weight[1]))
    our_scores = torch.einsum("qhd,khd->hqk", ours(weight[0]), ours(weight[1]))
    torch.testing.assert_close(our_scores, theirs_scores)


def test_embedding_split_by_rows_is_joined_too(tmp_path: Path) -> None:
    """Llama 3 splits the vocabulary where Llama 2 splits columns."""
    folder = write_toy_meta(tmp_path, shards=2)
    files = sorted(folder.glob("*.pth"))
    ranks = [torch.load(file) for file in files]
    whole = torch.cat([rank["tok_embeddings.weight"] for rank in ranks], dim=1)
    for file, rank, rows in zip(files, ranks, whole.chunk(2), strict=True):
        torch.save({**rank, "tok_embeddings.weight": rows.clone()}, file)
    checkpoint = open_folder(folder)
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), whole)


def test_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    checkpoint = open_folder(write_toy_meta(tmp_path, dtype=torch.bfloat16))
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.read("model.norm.weight").dtype == torch.bfloat16


def test_model_without_an_output_matrix_is_tied(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path) / "consolidated.00.pth"
    state = torch.load(file)
    del state["output.weight"]
    torch.save(state, file)
    checkpoint = open_folder(tmp_path)
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensor_names()


def test_folder_inside_a_hub_snapshot_is_found(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path / "original")
    checkpoint = open_folder(tmp_path, load_format="meta")
    assert checkpoint.source == folder
    assert checkpoint.tokenizer_path == folder


def test_tensor_stays_valid_after_close(tmp_path: Path) -> None:
    checkpoint = open_folder(write_toy_meta(tmp_path))
    norm = checkpoint.read("model.norm.weight")
    expected = norm.clone()
    checkpoint.close()
    assert torch.equal(norm, expected)
    with pytest.raises(WeightsError, match="after its files were closed"):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize(
    ("params", "ffn", "kv_heads", "context"),
    [
        (LLAMA_7B, 11008, 32, 2048),
        (LLAMA_2_70B, 28672, 8, 4096),
        (LLAMA_3_1_8B, 14336, 8, 131072),
        (LLAMA_3_2_1B, 8192, 8, 131072),
        ({**LLAMA_3_1_8B, "use_scaled_rope": False}, 14336, 8, 8192),
        ({**LLAMA_7B, "norm_eps": 1e-5, "rope_theta": 1e6}, 11008, 32, 16384),
    ],
)
def test_releases_of_meta_have_their_published_dimensions(
    params: dict[str, Any], ffn: int, kv_heads: int, context: int
) -> None:
    config = config_from_meta(params, 32000, WHERE, dtype="float16", is_tied=False)
    assert config.intermediate_size == ffn
    assert config.num_kv_heads == kv_heads
    assert config.max_position_embeddings == context


@pytest.mark.parametrize(
    ("params", "factor"),
    [
        (LLAMA_3_1_8B, 8.0),
        (LLAMA_3_2_1B, 32.0),
        ({**LLAMA_3_1_8B, "rope_scaling_factor": 16}, 16.0),
    ],
)
def test_scaled_rope_is_llama_3s(params: dict[str, Any], factor: float) -> None:
    config = config_from_meta(params, 128256, WHERE, dtype="bfloat16", is_tied=False)
    assert config.rope == RopeConfig(
        kind="llama3", theta=5e5, factor=factor, original_max_position_embeddings=8192
    )


def test_vocabulary_of_minus_one_is_that_of_the_embedding() -> None:
    config = config_from_meta(LLAMA_2_70B, 32000, WHERE, dtype="float16", is_tied=False)
    assert config.vocab_size == 32000


PARAM_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"n_heads": 3}, "dim 4096 does not divide by 3 heads"),
    "no heads": ({"n_heads": 0}, "dim 4096 does not divide by 0 heads"),
    "groups": ({"n_kv_heads": 5}, "n_heads is 32, not a multiple of 5 K/V heads"),
    "layers": ({"n_layers": -1}, "n_layers must be from 1 to 1024, not -1"),
    "missing": ({"dim": None}, "dim is missing"),
    "float": ({"dim": 4096.0}, "dim must be an integer, not 4096.0"),
    "multiple": ({"multiple_of": 0}, "multiple_of is 0"),
    "stretch": ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier is 1e+300"),
    "NaN": ({"norm_eps": float("nan")}, "norm_eps must be a finite number, not nan"),
    "theta": ({"rope_theta": -1}, "rope_theta must be above 1 and at most 1e+18, not -1.0"),
    "quantised": ({"quantization_args": {"group_size": 32}}, "quantization_args is not supported"),
}


@pytest.mark.parametrize("case", PARAM_REFUSALS)
def test_params_are_refused_in_one_line_that_names_the_field(case: str) -> None:
    overrides, message = PARAM_REFUSALS[case]
    with pytest.raises(ConfigError) as refusal:
        config_from_meta(
            {**LLAMA_3_1_8B, **overrides}, 128256, WHERE, dtype="float16", is_tied=False
        )
    assert str(refusal.value) == f"{WHERE}: {message}"


def test_missing_first_or_middle_shard_is_named(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path, shards=2)
    (folder / "consolidated.00.pth").unlink()
    assert refusal_of(folder) == (
        "consolidated.00.pth: is missing, though consolidated.01.pth is there"
    )


def test_missing_last_shard_is_noticed(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path, shards=2)
    (folder / "consolidated.01.pth").unlink()
    assert refusal_of(folder) == (
        "folder: the weights are split in 2 consolidated files, of which 1 are here"
    )


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (write_toy_meta(tmp_path) / "consolidated.00.pth").unlink()
    assert refusal_of(tmp_path) == "folder: has no consolidated.00.pth"


class Evil:
    """Makes a folder when it is unpickled by an unpickler that runs what it is told."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = write_toy_meta(tmp_path / "model")
    torch.save({"tok_embeddings.weight": Evil(marker)}, folder / "consolidated.00.pth")
    assert refusal_of(folder) == (
        "consolidated.00.pth: holds something other than tensors, which is never unpickled"
    )
    assert not marker.exists()


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = write_toy_meta(tmp_path / "model")
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Evil(marker)))
    assert refusal_of(folder) == (
        "consolidated.00.pth: is truncated or not an archive of torch.save"
    )
    assert not marker.exists()


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path) / "consolidated.00.pth"
    whole = file.read_bytes()
    for length in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert refusal_of(tmp_path) == (
            "consolidated.00.pth: is truncated or not an archive of torch.save"
        )


def test_damaged_pickle_stream_is_refused(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path, num_hidden_layers=1) / "consolidated.00.pth"
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    at = whole.index(b"\x80\x02", member.header_offset)
    refused = 0
    for step in range(0, member.file_size, 11):
        damaged = bytearray(whole)
        damaged[at + step] ^= 0xFF
        file.write_bytes(damaged)
        try:
            open_folder(tmp_path)
        except ModelError as refusal:
            refused += "\n" not in str(refusal)
    assert refused > 0.5 * member.file_size / 11


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path) / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert refusal_of(tmp_path) == (
        "consolidated.00.pth: has compressed members, which torch.save does not write"
    )


def edit(file: Path, **tensors: Any) -> None:
    torch.save({**torch.load(file), **tensors}, file)


def test_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path)
    huge = torch.zeros(1).expand(2**30, 2**10)
    edit(folder / "consolidated.00.pth", **{"output.weight": huge})
    assert refusal_of(folder) == (
        "consolidated.00.pth: tensor 'output.weight' is not laid out in order"
    )


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, {1: torch.zeros(1)}])
def test_what_is_no_dictionary_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, write_toy_meta(tmp_path) / "consolidated.00.pth")
    assert refusal_of(tmp_path).startswith("consolidated.00.pth: ")


def test_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path) / "consolidated.00.pth"
    state = torch.load(file)
    del state["layers.1.feed_forward.w2.weight"]
    torch.save(state, file)
    assert refusal_of(tmp_path) == ("folder: tensor model.layers.1.mlp.down_proj.weight is missing")


def test_tensor_missing_from_one_shard_is_refused_by_file(tmp_path: Path) -> None:
    file = write_toy_meta(tmp_path, shards=2) / "consolidated.01.pth"
    state = torch.load(file)
    del state["norm.weight"]
    torch.save(state, file)
    assert refusal_of(tmp_path) == "consolidated.01.pth: tensor 'norm.weight' is missing"


def test_misshapen_tensor_is_refused_by_the_files_own_name(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path)
    params = json.loads((folder / "params.json").read_text())
    write_json(folder / "params.json", params | {"multiple_of": 256})
    assert refusal_of(folder) == (
        "consolidated.00.pth: tensor 'layers.0.feed_forward.w1.weight' "
        "has shape [192, 64], not [256, 64]"
    )


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    folder = write_toy_meta(tmp_path, shards=2)
    edit(folder / "consolidated.01.pth", **{"norm.weight": torch.ones(32)})
    assert refusal_of(folder) == (
        "consolidated.01.pth: tensor 'norm.weight' is torch.float32 [32], "
        "but torch.float32 [64] in consolidated.00.pth"
    )
