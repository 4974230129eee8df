"""Safetensors files of a Hugging Face folder, one or several shards, mapped into memory.

Reads the format itself (a length, a JSON header, then bytes), so that every claim of a header is
checked against its file first: one that lies about sizes, a missing shard, or an index that
points out of the folder is refused by name.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from model.config import shown
from model.errors import ConfigError, WeightsError
from model.weights.fields import Fields, parse_json_object, read_json
from model.weights.mapped import MappedFile
from model.weights.tensors import PackedTensor, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FP8 = "F8_E4M3"  # readable only with the scales beside it, see model/weights/fp8.py
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class SafetensorsStore:
    """Tensors of one folder. A file is mapped when its first tensor is read."""

    def __init__(self, folder: Path) -> None:
        self._infos = _read_headers(folder)
        self._mapped: dict[Path, MappedFile] = {}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        if info.file not in self._mapped:
            self._mapped[info.file] = MappedFile(info.file)
        is_fp8 = info.dtype == FP8
        dtype: torch.dtype = torch.float8_e4m3fn if is_fp8 else getattr(torch, info.dtype)
        return self._mapped[info.file].tensor(info.offset, dtype, info.shape)

    def packed(self, name: str) -> PackedTensor | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        for mapped in self._mapped.values():
            mapped.close()


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that make up a folder's model; empty if it has none."""
    if (folder / INDEX).is_file():
        return tuple(folder / name for name in sorted(set(_weight_map(folder).values())))
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise WeightsError(f"{folder}: has {len(found)} safetensors files but no {INDEX}")
    return tuple(found)


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    files = weight_files(folder)
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file}: is missing, but {INDEX} names it")
        header = read_header(file)
        if len(files) > 1 and (twice := infos.keys() & header.keys()):
            raise WeightsError(f"{file}: tensor {shown(min(twice))} is in another file as well")
        infos.update(header)
    if (folder / INDEX).is_file():
        for name, filename in _weight_map(folder).items():
            if name not in infos or infos[name].file.name != filename:
                raise WeightsError(f"{folder / filename}: tensor {shown(name)} is missing")
    return infos


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = Fields(read_json(path), str(path)).raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map must be an object that names files")
    files: dict[str, str] = {}
    for name, filename in weight_map.items():
        # A bare name: the index of an untrusted folder may not reach into another.
        if not isinstance(filename, str) or Path(filename).name != filename or "\\" in filename:
            raise WeightsError(f"{path}: {shown(filename)} is not the name of a file in the folder")
        if not filename.endswith(".safetensors"):
            raise WeightsError(f"{path}: {shown(filename)} is not a safetensors file")
        files[name] = filename
    return files


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one file against the file's size. Raises WeightsError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{file}: is truncated or no safetensors file: "
                    f"its header would be {length} bytes long, the file is {size}"
                )
            header = stream.read(length)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        entries = parse_json_object(header, f"{file}: header")
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    entries.pop("__metadata__", None)
    return _checked_entries(file, entries, 8 + length, size - 8 - length)


def _checked_entries(
    file: Path, entries: dict[str, object], data_at: int, data_bytes: int
) -> dict[str, TensorInfo]:
    """Check that the tensors tile the data exactly, in any order of names."""
    spans: list[tuple[int, int, str]] = []
    infos: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        where = f"{file}: tensor {shown(name)}"
        dtype, shape, begin, end = _entry(where, entry)
        needed = (math.prod(shape) * _BITS[dtype] + 7) // 8 if dtype in _BITS else end - begin
        if needed != end - begin:
            raise WeightsError(
                f"{where}: {dtype} {list(shape)} takes {needed} bytes, not {end - begin}"
            )
        if end > data_bytes:
            raise WeightsError(
                f"{where}: ends at byte {end}, but the file holds {data_bytes}; it is truncated"
            )
        spans.append((begin, end, name))
        infos[name] = TensorInfo(
            stored_name=name,
            file=file,
            dtype=_FLOATS.get(dtype, dtype),
            shape=shape,
            num_bytes=end - begin,
            offset=data_at + begin,
            is_readable=dtype in _FLOATS,
        )
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise WeightsError(
                f"{file}: tensor {shown(name)} begins at byte {begin}, expected {at}"
            )
        at = end
    if at != data_bytes:
        raise WeightsError(f"{file}: {data_bytes - at} bytes after the last tensor")
    return infos


def _entry(where: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Take one header entry apart; anything but the expected types is refused."""
    if isinstance(entry, dict):
        dtype, shape = entry.get("dtype"), _sizes(entry.get("shape"))
        span = _sizes(entry.get("data_offsets"))
        if isinstance(dtype, str) and shape is not None and span and len(span) == 2:
            begin, end = span
            if begin <= end:
                return dtype, shape, begin, end
    raise WeightsError(f"{where}: has a malformed header entry: {shown(entry)}")


def _sizes(value: object) -> tuple[int, ...] | None:
    """Return a list of at most 8 sizes, None if it is anything else."""
    if not isinstance(value, list) or len(value) > 8:
        return None
    if not all(type(item) is int and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)
