"""A checkpoint opened by its headers, and the one way to open it.

Owns the choice of format and the order of checks: config first, then every tensor's header against
it, and only then may anyone allocate or read. Knows nothing of devices or of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import DTYPES, GenerationDefaults, LoadOptions, ModelConfig
from model.errors import ConfigError, WeightsError
from model.weights import meta
from model.weights.dummy import DummyStore
from model.weights.fields import Fields, read_json
from model.weights.fp8 import FP8_CODES, Fp8Store, check_quantization
from model.weights.gguf import read_gguf
from model.weights.gguf_model import (
    GgufStore,
    config_from_gguf,
    ends_of_text,
    generation_from_gguf,
)
from model.weights.huggingface import (
    config_from_hf,
    declared_dtype,
    generation_from_hf,
    within_vocabulary,
)
from model.weights.safetensors import FP8, SafetensorsStore, weight_files
from model.weights.source import resolve_model, resolve_tokenizer
from model.weights.tensors import (
    EMBEDDING,
    HEAD,
    PackedTensor,
    TensorStore,
    fingerprint,
    required_tensors,
    verify_tensors,
)

NUMBERS = ("float32", "float16", "bfloat16", FP8_CODES)  # how matrices come but in blocks
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk whose headers have been read and checked."""

    source: Path  # folder or .gguf file
    load_format: str  # safetensors, gguf, meta or dummy
    config: ModelConfig
    generation: GenerationDefaults
    eos_token_ids: tuple[int, ...]  # the union over all files; the tokenizer may know more
    tokenizer_path: Path  # folder or .gguf file
    num_bytes: int  # of the tensors of the model, as stored
    fingerprint: str  # of config, tensor headers and file sizes
    store: TensorStore

    def tensor_names(self) -> list[str]:
        """Return the canonical names of all tensors of the model, in the order of the network."""
        return list(required_tensors(self.config))

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in Hugging Face's layout, in the dtype that it is stored in.

        It may look straight into the file; quantised blocks come as float32. Raises WeightsError.
        """
        return self.store.read(name)

    def packed(self, name: str) -> PackedTensor | None:
        """Return the quantised blocks of a matrix of a GGUF file, None where there are none."""
        return self.store.packed(name)

    @property
    def has_blocks(self) -> bool:
        """Whether any matrix is in a GGUF file's quantised blocks."""
        return any(info.dtype not in NUMBERS for info in self.store.infos.values())

    @property
    def fp8(self) -> Fp8Store | None:
        """The store of a checkpoint with matrices in fp8, None for any other."""
        return self.store if isinstance(self.store, Fp8Store) else None

    def stored_bytes(self, name: str) -> int:
        """Return the size of one tensor as stored: what reading it adds to progress."""
        return self.store.infos[name].num_bytes

    def close(self) -> None:
        """Let go of the files; tensors that were read stay valid."""
        self.store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """What one format's files yield."""

    config: ModelConfig
    store: TensorStore
    generation: GenerationDefaults
    eos_token_ids: tuple[int, ...]


def open_checkpoint(options: LoadOptions) -> Checkpoint:
    """Find a model, read its headers and check that all of it is there and fits together.

    Downloads from the Hub if the model is named by an id. Raises ConfigError and WeightsError,
    before anything of the model's size is allocated.
    """
    found = resolve_model(options)
    load_format = _detect(found, options)
    source = _entry(found, load_format)
    opened = _OPENERS[load_format](source, options)
    verify_tensors(opened.config, opened.store, source)
    ends = opened.config.eos_token_ids + opened.eos_token_ids
    is_ours = options.generation_config == "vllm"
    return Checkpoint(
        source=source,
        load_format=load_format,
        config=opened.config,
        generation=GenerationDefaults() if is_ours else opened.generation,
        eos_token_ids=within_vocabulary(ends, opened.config.vocab_size),
        tokenizer_path=resolve_tokenizer(options, source),
        num_bytes=sum(
            opened.store.infos[name].num_bytes for name in required_tensors(opened.config)
        ),
        fingerprint=fingerprint(opened.config, opened.store),
        store=opened.store,
    )


def _detect(source: Path, options: LoadOptions) -> str:
    """Return the format of what was found, or of what was asked for if it can be that."""
    if source.is_file():
        if options.load_format not in ("auto", "gguf"):
            raise ConfigError(f"{source}: is a file; {options.load_format} needs a folder")
        return "gguf"
    if options.load_format != "auto":
        return options.load_format
    if weight_files(source):
        return "safetensors"
    if (source / meta.PARAMS).is_file() or (source / "original" / meta.PARAMS).is_file():
        return "meta"
    if any(source.glob("*.gguf")):
        return "gguf"
    pickles = sorted(source.glob("*.bin")) + sorted(source.glob("*.pt*"))
    if pickles:
        raise WeightsError(
            f"{source}: has its weights only in {pickles[0].name}, a pickle, which could run code; "
            "convert them to safetensors"
        )
    raise WeightsError(f"{source}: has no weights (safetensors, GGUF or Meta's consolidated.*.pth)")


def _entry(found: Path, load_format: str) -> Path:
    """Return the file or folder, inside of what was found, that holds a format."""
    if load_format == "meta" and (found / "original" / meta.PARAMS).is_file():
        return found / "original"  # where Meta's own Hub repositories keep it
    if load_format == "gguf" and found.is_dir():
        files = sorted(found.glob("*.gguf"))
        if len(files) != 1:
            raise WeightsError(f"{found}: has {len(files)} .gguf files; name the one to load")
        return files[0]
    return found


def _open_safetensors(folder: Path, options: LoadOptions) -> _Opened:  # noqa: ARG001
    config_path = folder / CONFIG
    values = read_json(config_path)
    config = config_from_hf(values, str(config_path))
    if not weight_files(folder):
        raise WeightsError(f"{folder}: has no safetensors file")
    stored = SafetensorsStore(folder)
    store: TensorStore = stored
    if any(info.dtype == FP8 for info in stored.infos.values()):
        store = Fp8Store(stored, config, check_quantization(values, str(config_path)))
    embedding = store.infos.get(EMBEDDING)
    if embedding and embedding.dtype in DTYPES and not declared_dtype(values, str(config_path)):
        config = replace(config, dtype=embedding.dtype)
    generation, ends = _generation(folder)
    return _Opened(config=config, store=store, generation=generation, eos_token_ids=ends)


def _open_gguf(path: Path, options: LoadOptions) -> _Opened:  # noqa: ARG001
    file = read_gguf(path)
    config = config_from_gguf(file)
    return _Opened(
        config=config,
        store=GgufStore(file, config),
        generation=generation_from_gguf(file),
        eos_token_ids=ends_of_text(file, config.vocab_size),
    )


def _open_meta(folder: Path, options: LoadOptions) -> _Opened:  # noqa: ARG001
    where = folder / meta.PARAMS
    params = read_json(where)
    store = meta.MetaStore(folder, params)
    embedding = store.infos.get(EMBEDDING)
    if embedding is None:
        raise WeightsError(f"{folder}: tensor tok_embeddings.weight is missing")
    config = meta.config_from_meta(
        params,
        embedding.shape[0],
        str(where),
        dtype=embedding.dtype,
        is_tied=HEAD not in store.infos,
    )
    generation, ends = _generation(folder)
    return _Opened(config=config, store=store, generation=generation, eos_token_ids=ends)


def _open_dummy(folder: Path, options: LoadOptions) -> _Opened:
    path = folder / CONFIG
    config = config_from_hf(read_json(path), str(path))
    generation, ends = _generation(folder)
    is_on_card = options.device.startswith("cuda") or options.device == "auto"
    device = torch.device("cuda" if is_on_card and torch.cuda.is_available() else "cpu")
    store = DummyStore(config, options.seed, path, device)
    return _Opened(config=config, store=store, generation=generation, eos_token_ids=ends)


_OPENERS: dict[str, Callable[[Path, LoadOptions], _Opened]] = {
    "safetensors": _open_safetensors,
    "gguf": _open_gguf,
    "meta": _open_meta,
    "dummy": _open_dummy,
}


def _generation(folder: Path) -> tuple[GenerationDefaults, tuple[int, ...]]:
    """Read sampling defaults and ends of text from generation_config.json, if there is one."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return GenerationDefaults(), ()
    values = read_json(path)
    ends = Fields(values, str(path)).token_ids("eos_token_id")
    return generation_from_hf(values, str(path)), ends
