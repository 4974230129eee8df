"""The GGUF container: fields and tensors are read right, and lies are refused before they cost."""

import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import WeightsError
from model.weights.gguf import GgufFile, read_gguf
from tests.toy import write_toy_gguf


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str = "t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + shape + struct.pack("<IQ", kind, offset)


def header(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    fields: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_fields: int | None = None,
    num_tensors: int | None = None,
    space: int = 64,
) -> bytes:
    """A whole file by hand: header, padding to 32, `space` bytes of data."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(fields) if num_fields is None else num_fields,
    )
    raw = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(space)


def read_bytes(folder: Path, raw: bytes) -> GgufFile:
    path = folder / "by-hand.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def test_header_says_what_gguf_pys_reader_reads(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path, quant="Q4_0", tie_word_embeddings=True)
    theirs = gguf.GGUFReader(path)
    ours = read_gguf(path)
    fields = {
        name: value.contents()
        for name, value in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert ours.fields == fields
    assert {
        name: (info.type, info.shape, info.offset, info.num_bytes)
        for name, info in ours.tensors.items()
    } == {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(tensor.shape.tolist()[::-1]),
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in theirs.tensors
    }


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (0, b"\xff", 255),
        (1, b"\xff", -1),
        (2, b"\xff\xff", 65535),
        (3, b"\xff\xff", -1),
        (4, b"\xff\xff\xff\xff", 2**32 - 1),
        (5, b"\xff\xff\xff\xff", -1),
        (6, struct.pack("<f", 0.5), 0.5),
        (7, b"\x01", True),
        (8, string("né"), "né"),
        (10, b"\xff" * 8, 2**64 - 1),
        (11, b"\xff" * 8, -1),
        (12, struct.pack("<d", 0.1), 0.1),
        (9, struct.pack("<IQ", 8, 2) + string("a") + string(""), ["a", ""]),
        (9, struct.pack("<IQ", 5, 2) + struct.pack("<2i", 1, -2), [1, -2]),
        (9, struct.pack("<IQ", 6, 1) + struct.pack("<f", 0.25), [0.25]),
        (9, struct.pack("<IQ", 7, 2) + b"\x00\x01", [False, True]),
        (9, struct.pack("<IQ", 4, 0), []),
    ],
)
def test_every_type_of_field_is_read(kind: int, raw: bytes, value: Any, tmp_path: Path) -> None:
    read = read_bytes(tmp_path, header(fields=(field("k", kind, raw),))).fields["k"]
    assert read == value
    assert type(read) is type(value)


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    raw = header(
        version=2,
        fields=(field("general.alignment", 4, struct.pack("<I", 64)),),
        tensors=(tensor("a"), tensor("b", offset=64)),
        space=256,
    )
    tensors = read_bytes(tmp_path, raw).tensors
    assert tensors["a"].offset % 64 == 0
    assert tensors["b"].offset == tensors["a"].offset + 64


HUGE = 2**60
REFUSALS: dict[str, tuple[bytes, str]] = {
    "magic": (header(magic=b"GGML"), "is not a GGUF file"),
    "empty": (b"", "is empty, not a GGUF file"),
    "four bytes": (b"GGUF", "is truncated at byte 4"),
    "version 1": (header(version=1), "has GGUF version 1, only 2 and 3 are read"),
    "big-endian": (
        header(version=3 << 24),
        "has GGUF version 50331648 (big-endian), only 2 and 3 are read",
    ),
    "fields": (header(num_fields=HUGE), f"claims {HUGE} fields, more than its 96 bytes can hold"),
    "tensors": (
        header(num_tensors=HUGE),
        f"claims {HUGE} tensors, more than its 96 bytes can hold",
    ),
    "string length": (
        header(fields=(struct.pack("<Q", HUGE),), num_fields=1),
        f"is truncated: a string would end at byte {HUGE + 32} of 96",
    ),
    "array of strings": (
        header(fields=(field("k", 9, struct.pack("<IQ", 8, HUGE)),)),
        f"claims {HUGE} strings in 'k', more than its 128 bytes can hold",
    ),
    "array of numbers": (
        header(fields=(field("k", 9, struct.pack("<IQ", 12, HUGE)),)),
        f"claims {HUGE} values in 'k', more than its 128 bytes can hold",
    ),
    "array of flags": (
        header(fields=(field("k", 9, struct.pack("<IQ", 7, HUGE)),)),
        f"claims {HUGE} values in 'k', more than its 128 bytes can hold",
    ),
    "array of arrays": (
        header(fields=(field("k", 9, struct.pack("<IQ", 9, 1)),)),
        "field 'k' is an array of unsupported type 9",
    ),
    "type of field": (header(fields=(field("k", 13, b""),)), "field 'k' has unknown type 13"),
    "flag": (header(fields=(field("k", 7, b"\x02"),)), "field 'k' holds 2 for a boolean"),
    "not UTF-8": (
        header(fields=(field("k", 8, string(b"\xff\xfe")),)),
        "a string before byte 47 is not UTF-8: invalid start byte",
    ),
    "field twice": (header(fields=(field("k", 0, b"1"),) * 2), "field 'k' appears twice"),
    "line break in a name": (
        header(fields=(field("k\nk", 13, b""),)),
        "field 'k\\nk' has unknown type 13",
    ),
    "dimensions": (header(tensors=(tensor(dims=(1,) * 5),)), "tensor 't' has 5 dimensions"),
    "no dimension": (
        header(tensors=(tensor(dims=()),), space=128),
        "tensor 't' has 0 dimensions",
    ),
    "elements": (
        header(tensors=(tensor(dims=(HUGE, HUGE)),)),
        f"is truncated: tensor 't' ends at byte {HUGE * HUGE * 4 + 96} of 160",
    ),
    "offset": (
        header(tensors=(tensor(offset=HUGE),)),
        f"is truncated: tensor 't' ends at byte {HUGE + 80} of 128",
    ),
    "unaligned": (
        header(tensors=(tensor(offset=4),)),
        "tensor 't' begins at 4, not a multiple of 32",
    ),
    "overlap": (
        header(tensors=(tensor("a", (16,)), tensor("b", (4,), offset=32)), space=128),
        "tensor 'b' overlaps the tensor before it",
    ),
    "tensor twice": (
        header(tensors=(tensor("a"), tensor("a", offset=32))),
        "tensor 'a' appears twice",
    ),
    "unread type": (
        header(tensors=(tensor(kind=10),)),
        "tensor 't' has type Q2_K; supported are "
        "F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K BF16",
    ),
    "unknown type": (
        header(tensors=(tensor(kind=4711),)),
        "tensor 't' has type number 4711; supported are "
        "F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K BF16",
    ),
    "half a block": (
        header(tensors=(tensor(dims=(48,), kind=2),)),
        "tensor 't' has rows of 48, not a multiple of 32",
    ),
    "alignment": (
        header(fields=(field("general.alignment", 4, struct.pack("<I", 24)),)),
        "general.alignment is 24, not a power of two above 7",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_header_is_refused_in_one_line_without_allocating(case: str, tmp_path: Path) -> None:
    raw, message = REFUSALS[case]
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as refusal:
            read_bytes(tmp_path, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(refusal.value) == f"{tmp_path / 'by-hand.gguf'}: {message}"
    assert peak < 1_000_000


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path, num_hidden_layers=1)
    whole = path.read_bytes()
    for length in [*range(0, 400, 7), *np.linspace(400, len(whole) - 33, 60).astype(int).tolist()]:
        with pytest.raises(WeightsError):
            read_bytes(tmp_path, whole[:length])


SMALL_FILE = header(
    fields=(
        field("general.architecture", 8, string("llama")),
        field("tokens", 9, struct.pack("<IQ", 8, 3) + string("a") + string("b") + string("c")),
        field("scores", 9, struct.pack("<IQ", 6, 3) + struct.pack("<3f", 1, 2, 3)),
    ),
    tensors=(tensor("a", (32, 2), 2), tensor("b", (8,), 0, offset=64)),
    space=128,
)


def tensors_end(path: Path) -> int:
    """Where the last tensor ends, 0 for a file that is refused."""
    try:
        tensors = read_gguf(path).tensors
    except WeightsError:
        return 0
    return max((info.offset + info.num_bytes for info in tensors.values()), default=0)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(SMALL_FILE) - 1), bit=st.integers(0, 7))
def test_file_with_any_bit_flipped_is_refused_or_keeps_its_bounds(
    at: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(SMALL_FILE)
    raw[at] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(raw)
    assert tensors_end(path) <= len(raw)


def test_vocabulary_of_llama_3_is_read_fast(tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(128_256)]
    merges = [f"left{number} right{number}" for number in range(280_147)]
    strings = [
        field(name, 9, struct.pack("<IQ", 8, len(texts)) + b"".join(map(string, texts)))
        for name, texts in (("tokens", tokens), ("merges", merges))
    ]
    raw = header(fields=tuple(strings))
    begin = time.perf_counter()
    fields = read_bytes(tmp_path, raw).fields
    # Takes 0.3 s on two cores; the bound is for a busy machine.
    assert time.perf_counter() - begin < 3.0
    assert (fields["tokens"], fields["merges"]) == (tokens, merges)
