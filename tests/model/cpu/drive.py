"""Native networks over toy checkpoints, and single operations called by hand."""

import ctypes
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.config import LoadOptions, ModelConfig
from model.cpu.library import Library, Matrix, pointer
from model.cpu.network import NativeNetwork, Quantization, Sizes
from model.weights.checkpoint import open_checkpoint
from tests.model.drive import BLOCK_SIZE, MAX_MODEL_LEN


def load_native(
    folder: Path,
    library: Library,
    quantization: Quantization,
    kv_dtype: torch.dtype | None = None,
    num_blocks: int = 400,
) -> tuple[ModelConfig, NativeNetwork]:
    """Build the native network of a checkpoint with a small pool."""
    checkpoint = open_checkpoint(LoadOptions(model=str(folder)))
    config = checkpoint.config
    default = torch.float32 if quantization == "none" else torch.float16
    sizes = Sizes(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=min(MAX_MODEL_LEN, config.max_position_embeddings),
        max_tokens=2048,
    )
    network = NativeNetwork(
        config,
        checkpoint,
        library,
        scheme=quantization,
        kv_dtype=kv_dtype or default,
        sizes=sizes,
    )
    return config, network


class Rows(ctypes.Structure):
    """Quantised activations; see native.h."""

    _fields_ = (
        ("group", c_int32),
        ("padded_cols", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("totals", c_void_p),
        ("offsets", c_void_p),
        ("floats", c_void_p),
        ("stride", c_int32),
    )


@dataclass
class Quantized:
    """Rows with the memory behind them."""

    rows: Rows
    codes: Tensor  # [T, padded cols] int8
    scales: Tensor  # [T, groups]
    totals: Tensor  # [T, groups]
    offsets: Tensor  # [T, groups] int32


def quantize(library: Library, x: Tensor, matrix: Matrix) -> Quantized:
    """Quantise x [T, cols] as a matrix wants it."""
    groups = matrix.padded_cols // matrix.group
    codes = torch.zeros(x.shape[0], matrix.padded_cols, dtype=torch.int8)
    scales = torch.zeros(x.shape[0], groups)
    totals = torch.zeros(x.shape[0], groups)
    offsets = torch.zeros(x.shape[0], groups, dtype=torch.int32)
    rows = Rows(
        codes=pointer(codes),
        scales=pointer(scales),
        totals=pointer(totals),
        offsets=pointer(offsets),
    )
    library._c.quantize_rows(
        library.pool,
        ctypes.byref(rows),
        pointer(x),
        c_int32(x.shape[1]),
        c_int32(x.shape[1]),
        c_int32(x.shape[0]),
        ctypes.byref(matrix),
    )
    return Quantized(rows, codes, scales, totals, offsets)


def multiply(library: Library, quantized: Quantized, parts: list[Matrix], num_rows: int) -> Tensor:
    """Return the product [num_rows, outputs of all parts]."""
    width = sum(part.rows for part in parts)
    out = torch.full((num_rows, width), torch.nan)
    pointers = (ctypes.POINTER(Matrix) * len(parts))(*(ctypes.pointer(part) for part in parts))
    library._c.matmul(
        library.pool,
        ctypes.byref(quantized.rows),
        c_int32(num_rows),
        pointers,
        c_int32(len(parts)),
        pointer(out),
        c_int32(width),
    )
    return out


def unpack(library: Library, matrix: Matrix) -> Tensor:
    """Return a matrix as float32 [rows, cols]."""
    return torch.stack([library.unpack_row(matrix, row) for row in range(matrix.rows)])


def rms_norm(library: Library, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    library._c.rms_norm(
        library.pool,
        pointer(x),
        None if weight is None else pointer(weight),
        c_float(eps),
        pointer(out),
        c_int32(x.shape[1]),
        c_int32(x.shape[0]),
    )
    return out


def swiglu(library: Library, gate_up: Tensor) -> Tensor:
    size = gate_up.shape[1] // 2
    work = gate_up.clone()
    library._c.swiglu(library.pool, pointer(work), c_int32(size), c_int32(work.shape[0]))
    return work[:, :size]
