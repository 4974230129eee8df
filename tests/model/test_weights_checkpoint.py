"""Finding a model and telling its format: paths, Hub ids, dummy weights, and clear refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from model.config import LoadOptions
from model.errors import ConfigError, ModelError, WeightsError
from model.weights.checkpoint import Checkpoint, open_checkpoint
from model.weights.tensors import required_tensors
from tests.toy import write_toy_checkpoint, write_toy_gguf, write_toy_meta

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def open_model(model: object, **options: Any) -> Checkpoint:
    return open_checkpoint(LoadOptions(model=str(model), **options))


def refusal_of(model: object, **options: Any) -> str:
    with pytest.raises(ModelError) as refusal:
        open_model(model, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_format_is_told_from_what_is_there(tmp_path: Path) -> None:
    written = {
        "safetensors": write_toy_checkpoint(tmp_path / "hf"),
        "gguf": write_toy_gguf(tmp_path / "gguf"),
        "meta": write_toy_meta(tmp_path / "meta"),
    }
    for load_format, path in written.items():
        checkpoint = open_model(path)
        assert (checkpoint.load_format, checkpoint.source) == (load_format, path)


def test_safetensors_are_preferred_where_several_forms_lie_together(tmp_path: Path) -> None:
    write_toy_meta(tmp_path)
    write_toy_gguf(tmp_path)
    write_toy_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert open_model(tmp_path).load_format == "safetensors"
    assert open_model(tmp_path, load_format="meta").load_format == "meta"
    assert open_model(tmp_path, load_format="gguf").load_format == "gguf"


def test_the_same_model_in_three_forms_has_the_same_tensors(tmp_path: Path) -> None:
    sizes = {"vocab_size": 570, "intermediate_size": 192}
    forms = [
        open_model(write_toy_checkpoint(tmp_path / "hf", **sizes)),
        open_model(write_toy_gguf(tmp_path / "gguf", **sizes)),
        open_model(write_toy_meta(tmp_path / "meta", **sizes)),
    ]
    for name in forms[0].tensor_names():
        first, *others = (form.read(name) for form in forms)
        assert all(torch.equal(first, other) for other in others), name


def test_names_and_bytes_are_those_of_the_network(tmp_path: Path) -> None:
    checkpoint = open_model(write_toy_checkpoint(tmp_path, tie_word_embeddings=True))
    assert checkpoint.tensor_names() == list(required_tensors(checkpoint.config))
    assert checkpoint.num_bytes == checkpoint.config.num_parameters * 4
    sizes = [checkpoint.stored_bytes(name) for name in checkpoint.tensor_names()]
    assert sum(sizes) == checkpoint.num_bytes


def test_dummy_needs_a_config_alone(tmp_path: Path) -> None:
    (write_toy_checkpoint(tmp_path, tokenizer=False) / "model.safetensors").unlink()
    checkpoint = open_model(tmp_path, load_format="dummy")
    for name, shape in required_tensors(checkpoint.config).items():
        tensor = checkpoint.read(name)
        assert tensor.shape == shape
        assert bool(tensor.isfinite().all())
    assert checkpoint.num_bytes == checkpoint.config.num_parameters * 4


def test_dummy_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    first, again, other = (
        open_model(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2)
    )
    first.read("lm_head.weight")  # order does not matter
    assert torch.equal(first.read(Q_PROJ), again.read(Q_PROJ))
    assert not torch.equal(first.read(Q_PROJ), other.read(Q_PROJ))
    assert not torch.equal(first.read(Q_PROJ), first.read(Q_PROJ.replace("layers.0", "layers.1")))


def test_dummy_weights_have_the_configs_dtype_and_a_sensible_scale(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, torch_dtype="bfloat16")
    checkpoint = open_model(tmp_path, load_format="dummy")
    head = checkpoint.read("lm_head.weight")
    assert head.dtype == torch.bfloat16
    assert float(head.float().std()) == pytest.approx(3.0 / 8.0, rel=0.05)
    assert torch.equal(checkpoint.read("model.norm.weight").float(), torch.ones(64))


def test_rows_of_a_large_dummy_matrix_differ(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path, vocab_size=60_000, tokenizer=False)
    head = open_model(tmp_path, load_format="dummy").read("lm_head.weight")
    assert head.numel() > 3 * 2**20
    assert len(head.unique(dim=0)) == 60_000


def test_absurd_dummy_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 1048576'))
    assert refusal_of(tmp_path, load_format="dummy") == (
        f"{config}: hidden_size must be from 1 to 131072, not 1048576"
    )


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refusal_of(tmp_path) == (
        f"{tmp_path}: has no weights (safetensors, GGUF or Meta's consolidated.*.pth)"
    )


def test_format_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "gguf")
    assert refusal_of(path, load_format="safetensors") == (
        f"{path}: is a file; safetensors needs a folder"
    )
    folder = write_toy_checkpoint(tmp_path / "hf")
    assert refusal_of(folder, load_format="gguf") == (
        f"{folder}: has 0 .gguf files; name the one to load"
    )
    assert refusal_of(folder, load_format="meta") == (
        f"{folder / 'params.json'}: cannot be read: No such file or directory"
    )


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = write_toy_checkpoint(tmp_path) / "model.safetensors"
    assert refusal_of(path) == f"{path}: is not a GGUF file"


def test_choice_between_gguf_files_is_left_to_the_user(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path)
    shutil.copy(path, tmp_path / "other.gguf")
    assert refusal_of(tmp_path) == f"{tmp_path}: has 2 .gguf files; name the one to load"


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nowhere", "nowhere", "nowhere.gguf", "../a/b/c", "", "a b/c"]
)
def test_path_that_is_not_there_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal_of(model) == (
        f"{model or repr(model)}: no such file or folder, and no id of a repository"
    )


def test_tokenizer_may_lie_elsewhere(tmp_path: Path) -> None:
    model = write_toy_checkpoint(tmp_path / "model", tokenizer=False)
    other = write_toy_checkpoint(tmp_path / "other")
    assert open_model(model).tokenizer_path == model
    assert open_model(model, tokenizer=str(other)).tokenizer_path == other
    assert refusal_of(model, tokenizer="./nowhere") == (
        "./nowhere: no such file or folder, and no id of a repository"
    )


def cached_snapshot(cache: Path, write: Callable[[Path], Path]) -> None:
    """Lay a repository owner/name out as the Hub's cache does."""
    repository = cache / "models--owner--name"
    write(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_hub_id_is_found_in_the_cache_when_offline(tmp_path: Path) -> None:
    cached_snapshot(tmp_path, write_toy_checkpoint)
    checkpoint = open_model("owner/name", download_dir=str(tmp_path), offline=True)
    assert checkpoint.config.num_layers == 2
    assert checkpoint.source.name == "0" * 40


def test_gguf_inside_a_hub_repository_is_named_by_its_path(tmp_path: Path) -> None:
    cached_snapshot(tmp_path, write_toy_gguf)
    checkpoint = open_model("owner/name/toy.gguf", download_dir=str(tmp_path), offline=True)
    assert checkpoint.load_format == "gguf"
    assert checkpoint.source.name == "toy.gguf"


def test_hub_id_that_is_not_cached_is_refused_when_offline(tmp_path: Path) -> None:
    assert refusal_of("owner/name", download_dir=str(tmp_path), offline=True) == (
        "owner/name: no such folder, not in the cache, and HF_HUB_OFFLINE is set; name a folder "
        "or a file"
    )


class FakeHub:
    """Stands for `snapshot_download`: records what was asked for, then gives or fails."""

    def __init__(self, outcome: Path | Exception) -> None:
        self.outcome = outcome
        self.asked: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **wanted: Any) -> str:
        self.asked.append({"repo_id": repo_id, **wanted})
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return str(self.outcome)


def hub(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> FakeHub:
    fake = FakeHub(outcome)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_offline_mode_asks_for_local_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(monkeypatch, write_toy_checkpoint(tmp_path))
    open_model("owner/name", offline=True)
    assert fake.asked[0]["local_files_only"] is True


def test_gguf_that_a_repository_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, tmp_path)
    assert refusal_of("owner/name/x.gguf") == (
        "owner/name/x.gguf: the repository owner/name has no such file"
    )


def test_hub_is_asked_for_no_pickles_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = hub(monkeypatch, write_toy_checkpoint(tmp_path))
    open_model("owner/name", revision="v1", hf_token="hf_x", download_dir="cache")
    (asked,) = fake.asked
    assert asked["repo_id"] == "owner/name"
    assert (asked["revision"], asked["token"], asked["cache_dir"]) == ("v1", "hf_x", "cache")
    assert asked["local_files_only"] is False
    files = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_evil.py",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "fp16/model.safetensors",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:6]


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("long\nstory", response=response(403)),
            "is gated; accept its licence at https://huggingface.co/owner/name and set HF_TOKEN to "
            "a token that may read it",
        ),
        (
            errors.RepositoryNotFoundError("long\nstory", response=response(404)),
            "no such folder here, and no such repository on the Hub for this token; a private one "
            "needs HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError("long\nstory", response=response(404)),
            "has no revision 'v1'",
        ),
        (
            errors.LocalEntryNotFoundError("long\nstory"),
            "no such folder, not in the cache, and the Hub cannot be reached; name a folder "
            "or a file",
        ),
        (
            errors.HfHubHTTPError("503 Service Unavailable\nstory", response=response(503)),
            "cannot be downloaded: 503 Service Unavailable",
        ),
        (errors.HTTPError("no route\nstory"), "cannot be downloaded: no route"),
        (OSError("disk full"), "cannot be downloaded: disk full"),
    ],
)
def test_hubs_failures_are_one_line_each(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, error)
    assert refusal_of("owner/name", revision="v1") == f"owner/name: {message}"


def test_snapshot_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_toy_checkpoint(tmp_path) / "model.safetensors").unlink()
    hub(monkeypatch, tmp_path)
    with pytest.raises(WeightsError, match="has no weights"):
        open_model("owner/name")


def test_errors_are_of_the_config_or_of_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_model(tmp_path / "nowhere")
    with pytest.raises(WeightsError):
        open_model(tmp_path)
