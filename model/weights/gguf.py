"""The GGUF container: magic, fields and tensor headers, read strictly and fast.

Every count, length and offset is held against the file's size before anything is made of it, so a
hostile header costs memory in proportion to the file at most. Knows the format (versions 2 and 3,
little-endian) and the sizes of block types; what fields mean is read elsewhere.
Reference: ggml/docs/gguf.md of ggml-org/ggml.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.config import shown
from model.errors import WeightsError

GgufValue = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]

# Elements and bytes of one block, by the number that stands for the type in a header.
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Types that exist but are not read: named in the refusal, so that a user knows what to look for.
_UNREAD_TYPES = {
    10: "Q2_K",
    11: "Q3_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
_SCALARS: dict[int, tuple[str, int]] = {  # value type: struct and numpy letter, bytes
    0: ("B", 1),
    1: ("b", 1),
    2: ("H", 2),
    3: ("h", 2),
    4: ("I", 4),
    5: ("i", 4),
    6: ("f", 4),
    10: ("Q", 8),
    11: ("q", 8),
    12: ("d", 8),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LEAST_FIELD_BYTES = 8 + 4 + 1  # length of an empty key, type, smallest value
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of an empty name, one dimension, type, offset


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensorInfo:
    """One tensor of the file, its shape in the order of rows and columns."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    fields: dict[str, GgufValue]
    tensors: dict[str, GgufTensorInfo]


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file. Raises WeightsError."""
    try:
        if not path.stat().st_size:  # which cannot be mapped
            raise WeightsError(f"{path}: is empty, not a GGUF file")
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            return _Reader(path, mapped).read()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """A cursor over the header. `at` never passes `size`."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.mapped = mapped
        self.size = len(mapped)
        self.at = 0

    def fail(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: {what}")

    def read(self) -> GgufFile:
        if self.mapped[:4] != b"GGUF":
            raise self.fail("is not a GGUF file")
        self.at = 4
        version = self._uint32()
        if version not in (2, 3):
            big = " (big-endian)" if version and version & 0xFFFF == 0 else ""
            raise self.fail(f"has GGUF version {version}{big}, only 2 and 3 are read")
        num_tensors, num_fields = self._uint64(), self._uint64()
        self._expect(num_fields, _LEAST_FIELD_BYTES, "fields")
        self._expect(num_tensors, _LEAST_TENSOR_BYTES, "tensors")
        fields: dict[str, GgufValue] = {}
        for _ in range(num_fields):
            name = self._string()
            if name in fields:
                raise self.fail(f"field {shown(name)} appears twice")
            fields[name] = self._value(name, self._uint32())
        headers = [self._tensor_header() for _ in range(num_tensors)]
        tensors = self._placed(headers, self._alignment(fields))
        return GgufFile(path=self.path, fields=fields, tensors=tensors)

    def _value(self, name: str, kind: int) -> GgufValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(name)
        if kind == _BOOL:
            return self._flag(name, self._take(1)[0])
        if kind in _SCALARS:
            letter, num_bytes = _SCALARS[kind]
            value: int | float = struct.unpack(f"<{letter}", self._take(num_bytes))[0]
            return value
        raise self.fail(f"field {shown(name)} has unknown type {kind}")

    def _array(self, name: str) -> GgufValue:
        kind, count = self._uint32(), self._uint64()
        if kind == _STRING:
            self._expect(count, 8, f"strings in {shown(name)}")
            return self._strings(count)
        if kind == _BOOL:
            self._expect(count, 1, f"values in {shown(name)}")
            return [self._flag(name, byte) for byte in self._take(count)]
        if kind in _SCALARS:
            letter, num_bytes = _SCALARS[kind]
            self._expect(count, num_bytes, f"values in {shown(name)}")
            raw = self._take(count * num_bytes)
            values: list[int] | list[float] = np.frombuffer(raw, dtype=f"<{letter}").tolist()
            return values
        raise self.fail(f"field {shown(name)} is an array of unsupported type {kind}")

    def _strings(self, count: int) -> list[str]:
        """Read strings in a row: a tokenizer has hundreds of thousands, so the loop is bare."""
        mapped, size, at = self.mapped, self.size, self.at
        unpack_length = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + unpack_length(mapped, at)[0]
                if at > size:
                    raise self.fail(f"is truncated: a string would end at byte {at} of {size}")
                strings.append(mapped[begin:at].decode())
        except struct.error:
            raise self.fail(f"is truncated at byte {size}") from None
        except UnicodeDecodeError as error:
            raise self.fail(f"a string before byte {at} is not UTF-8: {error.reason}") from error
        self.at = at
        return strings

    def _tensor_header(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Return name, type, shape, bytes, and offset in the data."""
        name = self._string()
        where = f"tensor {shown(name)}"
        num_dims = self._uint32()
        if not 1 <= num_dims <= 4:
            raise self.fail(f"{where} has {num_dims} dimensions")
        shape = tuple(self._uint64() for _ in range(num_dims))[::-1]
        number = self._uint32()
        offset = self._uint64()
        if number not in BLOCK_TYPES:
            kind = _UNREAD_TYPES.get(number, f"number {number}")
            readable = " ".join(name for name, _, _ in BLOCK_TYPES.values())
            raise self.fail(f"{where} has type {kind}; supported are {readable}")
        kind, block_len, block_bytes = BLOCK_TYPES[number]
        if shape[-1] % block_len:
            raise self.fail(f"{where} has rows of {shape[-1]}, not a multiple of {block_len}")
        num_bytes = math.prod(shape) // block_len * block_bytes
        return name, kind, shape, num_bytes, offset

    def _placed(
        self, headers: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GgufTensorInfo]:
        """Turn offsets in the data into offsets in the file; refuse overlaps and the file's end."""
        data_at = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensorInfo] = {}
        end = data_at
        for name, kind, shape, num_bytes, offset in sorted(headers, key=lambda header: header[4]):
            where = f"tensor {shown(name)}"
            if name in tensors:
                raise self.fail(f"{where} appears twice")
            begin = data_at + offset
            if offset % alignment:
                raise self.fail(f"{where} begins at {offset}, not a multiple of {alignment}")
            if begin < end:
                raise self.fail(f"{where} overlaps the tensor before it")
            end = begin + num_bytes
            if end > self.size:
                raise self.fail(f"is truncated: {where} ends at byte {end} of {self.size}")
            tensors[name] = GgufTensorInfo(
                name=name, type=kind, shape=shape, offset=begin, num_bytes=num_bytes
            )
        return tensors

    def _alignment(self, fields: dict[str, GgufValue]) -> int:
        alignment = fields.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 8 <= alignment <= 2**20
            or alignment & (alignment - 1)
        ):
            raise self.fail(f"general.alignment is {shown(alignment)}, not a power of two above 7")
        return alignment

    def _expect(self, count: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count * least_bytes > self.size - self.at:
            raise self.fail(f"claims {count} {what}, more than its {self.size} bytes can hold")

    def _flag(self, name: str, byte: int) -> bool:
        if byte > 1:
            raise self.fail(f"field {shown(name)} holds {byte} for a boolean")
        return byte == 1

    def _string(self) -> str:
        return self._strings(1)[0]

    def _uint32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _uint64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, num_bytes: int) -> bytes:
        end = self.at + num_bytes
        if end > self.size:
            raise self.fail(f"is truncated at byte {self.size}")
        taken = self.mapped[self.at : end]
        self.at = end
        return taken
