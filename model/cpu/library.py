"""The C library as Python sees it: its structs, field by field, and its functions, typed.

Every call lets go of the interpreter while it runs. Pointers are kept alive by who made them.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS_FLOAT32, WEIGHTS_INT8, WEIGHTS_INT4, WEIGHTS_STEPS = range(4)
SOURCE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KV_KINDS = {torch.float32: 0, torch.float16: 1, torch.int8: 2}
BLOCK_TYPES = {"Q8_0": 0, "Q4_0": 1, "Q4_1": 2, "Q4_K": 3}
PANEL = 16  # rows of a packed matrix side by side
TILE = 16  # tokens of a K/V tile
MAX_HEAD_DIM = 256


class Matrix(Structure):
    """A packed weight matrix; see native.h."""

    _fields_ = (
        ("kind", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("group", c_int32),
        ("padded_cols", c_int32),
        ("factor", c_float),
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("minima", c_void_p),
        ("steps", c_void_p),
        ("bias", c_void_p),
    )


class Layer(Structure):
    """One block's matrices, norms and K/V."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("output", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class RotationTable(Structure):
    """The orthogonal matrix that the residual stream is rotated by."""

    _fields_ = (
        ("size", c_int32),
        ("block", c_int32),
        ("mixing", c_void_p),
        ("signs", c_void_p),
    )


class Source(Structure):
    """A matrix of a file, and what is done to it before it is packed; see native.h."""

    _fields_ = (
        ("kind", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("values", c_void_p),
        ("columns", c_void_p),
        ("inputs", POINTER(RotationTable)),
        ("outputs", POINTER(RotationTable)),
    )


class Model(Structure):
    """A whole model."""

    _fields_ = (
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("kv_kind", c_int32),
        ("max_tokens", c_int32),
        ("kv_stride", c_int64),
        ("kv_head_stride", c_int64),
        ("norm_eps", c_float),
        ("final_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("rotation", RotationTable),
    )


class Step(Structure):
    """One step's tokens."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_sequences", c_int32),
        ("blocks_per_sequence", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("block_tables", c_void_p),
        ("query_starts", POINTER(c_int32)),
    )


class Library:
    """The loaded library with its pool of threads."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.pool_create.restype = c_void_p
        self._c.engine_create.restype = c_void_p
        self.pool = c_void_p(self._c.pool_create(c_int32(num_threads)))
        if not self.pool:
            raise MemoryError("no memory for the pool of threads")

    def close(self) -> None:
        """End the threads; nothing of the library may be used after it."""
        self._c.pool_destroy(self.pool)

    def pack_weights(self, matrix: Matrix, source: Source, work: Tensor) -> bool:
        """Fill a matrix's zeroed buffers and its factor, by way of float32 values in `work`.

        Returns False if the matrix cannot be quantised, as some weights are not finite.
        """
        done = self._c.pack_weights(
            self.pool, ctypes.byref(matrix), ctypes.byref(source), pointer(work)
        )
        return bool(done)

    def pack_blocks(
        self, matrix: Matrix, kind: int, blocks: int, row_bytes: int, source_rows: Tensor | None
    ) -> None:
        """Repack GGUF blocks at an address; `source_rows` [rows] int32 reorders them."""
        rows = None if source_rows is None else pointer(source_rows)
        self._c.pack_blocks(
            self.pool,
            ctypes.byref(matrix),
            c_int32(kind),
            c_void_p(blocks),
            c_int32(row_bytes),
            rows,
        )

    def unpack_row(self, matrix: Matrix, row: int) -> Tensor:
        """Return a row of a matrix as float32 [cols]."""
        values = torch.empty(matrix.cols)
        self._c.unpack_row(ctypes.byref(matrix), c_int32(row), pointer(values))
        return values

    def rotate(self, table: RotationTable, rows: Tensor) -> None:
        """Rotate float32 rows [N, size] in place."""
        self._c.rotate_rows(self.pool, ctypes.byref(table), pointer(rows), c_int32(rows.shape[0]))

    def unrotate(self, table: RotationTable, rows: Tensor) -> None:
        """Take a rotation back, in place."""
        self._c.unrotate_rows(self.pool, ctypes.byref(table), pointer(rows), c_int32(rows.shape[0]))

    def create_engine(self, model: Model) -> "Engine":
        """Return the work space for a model's steps."""
        engine = c_void_p(self._c.engine_create(ctypes.byref(model), self.pool))
        if not engine:
            raise MemoryError("no memory for the native step")
        return Engine(self._c, engine)


class Engine:
    """Runs steps of one model. Used by one thread at a time."""

    def __init__(self, c: ctypes.CDLL, engine: c_void_p) -> None:
        self._c = c
        self._engine = engine

    def forward(self, step: Step, hidden: Tensor) -> None:
        """Run the network over a step; fill the last hidden states [T, hidden]."""
        self._c.engine_forward(self._engine, ctypes.byref(step), pointer(hidden))

    def logits(self, hidden: Tensor, logits: Tensor) -> None:
        """Fill the logits [N, V] of hidden states [N, hidden]."""
        rows = c_int32(hidden.shape[0])
        self._c.engine_logits(self._engine, pointer(hidden), rows, pointer(logits))


def pointer(values: Tensor) -> c_void_p:
    """Return the address of a contiguous tensor in host memory."""
    assert values.is_contiguous()
    assert values.device.type == "cpu"
    return c_void_p(values.data_ptr())


def int32_array(values: Sequence[int]) -> "ctypes.Array[c_int32]":
    """Return a C array of the values."""
    return (c_int32 * len(values))(*values)
