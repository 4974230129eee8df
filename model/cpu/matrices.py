"""Weights in the native layouts: who holds the memory, and how a tensor becomes a matrix.

Schemes, and why each matrix is quantised as it is, are in `docs/quantization.md`.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.cpu.library import (
    BLOCK_TYPES,
    PANEL,
    SOURCE_KINDS,
    WEIGHTS_FLOAT32,
    WEIGHTS_INT4,
    WEIGHTS_INT8,
    WEIGHTS_STEPS,
    Library,
    Matrix,
    RotationTable,
    Source,
    pointer,
)
from model.errors import WeightsError
from model.weights.tensors import PackedTensor

BLOCK_GROUP = 32  # of GGUF's blocks
STEP_GROUP = 32  # columns that share a step
SLAB_BYTES = 32 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is to be stored: `group` columns share a scale; 0: all of a row."""

    kind: int
    group: int = 0


FLOAT32 = Form(WEIGHTS_FLOAT32)
INT8 = Form(WEIGHTS_INT8)
INT8_BY_64 = Form(WEIGHTS_INT8, 64)
INT8_BY_32 = Form(WEIGHTS_INT8, BLOCK_GROUP)
INT4 = Form(WEIGHTS_INT4, BLOCK_GROUP)  # repacked alone
STEPS_BY_64 = Form(WEIGHTS_STEPS, 64)
STEPS_BY_128 = Form(WEIGHTS_STEPS, 128)


class Arena:
    """Zeroed memory for weights, in slabs large enough for the kernel's huge pages."""

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._free = torch.empty(0, dtype=torch.uint8)
        self.num_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return zeroed bytes that live as long as the arena, aligned to a cache line."""
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._free.numel():
            slab = torch.from_numpy(np.zeros(max(size, SLAB_BYTES) + _ALIGNMENT, dtype=np.uint8))
            self._slabs.append(slab)
            self._free = slab[-slab.data_ptr() % _ALIGNMENT :]
        taken, self._free = self._free[:size], self._free[size:]
        self.num_bytes += size
        return taken[:num_bytes]

    def keep(self, values: Tensor) -> Tensor:
        """Return a copy of some values that lives as long as the arena."""
        memory = self.take(values.numel() * values.element_size())
        copy = memory.view(values.dtype).view(values.shape)
        copy.copy_(values)
        return copy


class Rotation:
    """A fixed random rotation of the residual stream, and what it does to weights.

    QuaRot (Ashkboos et al., arXiv 2404.00456): activations of a Llama have a few channels far
    larger than the rest, which ruin a common scale; in a rotated basis there are none.
    """

    def __init__(self, library: Library, arena: Arena, size: int, seed: int) -> None:
        self._library = library
        self._arena = arena  # the table points into it
        block = size & -size  # the largest power of two that divides it
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0
        odd = size // block
        mixing = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0]
        self.table = RotationTable(
            size=size,
            block=block,
            mixing=pointer(arena.keep(mixing.to(torch.float32).contiguous())),
            signs=pointer(arena.keep(signs)),
        )

    def rows(self, values: Tensor) -> Tensor:
        """Return float32 rows [N, size], each of them rotated."""
        rotated = values.to(torch.float32, copy=True).contiguous()
        self._library.rotate(self.table, rotated)
        return rotated


class Packer:
    """Turns tensors into matrices in an arena."""

    def __init__(self, library: Library, arena: Arena) -> None:
        self._library = library
        self._arena = arena
        self._work = torch.empty(0)

    def pack(
        self,
        values: Tensor,
        form: Form,
        bias: Tensor | None = None,
        *,
        columns: Tensor | None = None,
        inputs: Rotation | None = None,
        outputs: Rotation | None = None,
    ) -> Matrix:
        """Quantise values W [rows, cols], of a dtype in SOURCE_KINDS.

        First each column is multiplied by a float32 factor in `columns` [cols], and then W becomes
        W Qᵀ of the rotation of its `inputs`, or Q W of that of its `outputs`; a bias is taken as it
        is. Raises WeightsError if the values are not finite.
        """
        assert form is not INT4
        rows, cols = values.shape
        values = values.contiguous()
        source = Source(
            kind=SOURCE_KINDS[values.dtype], rows=rows, cols=cols, values=pointer(values)
        )
        if columns is not None:
            source.columns = pointer(columns)
        if inputs is not None:
            source.inputs = ctypes.pointer(inputs.table)
        if outputs is not None:
            source.outputs = ctypes.pointer(outputs.table)
        matrix = self._allocate(rows, cols, form, bias)
        if not self._library.pack_weights(matrix, source, self._work_space(rows, cols)):
            raise WeightsError(f"a matrix of {rows} x {cols} weights has some that are not finite")
        return matrix

    def _work_space(self, rows: int, cols: int) -> Tensor:
        """Return room for a matrix's values, the same from matrix to matrix: pages cost time."""
        size = (-(-rows // PANEL) * PANEL) * (-(-cols // PANEL) * PANEL)
        if size > self._work.numel():
            self._work = torch.empty(0)  # lets go of the old one before there is a new one
            self._work = torch.from_numpy(np.empty(size, dtype=np.float32))
        return self._work

    def repack(self, packed: PackedTensor, bias: Tensor | None = None) -> Matrix:
        """Take over GGUF's blocks, of a type in BLOCK_TYPES, without changing their codes."""
        rows, cols = packed.shape
        form = INT8_BY_32 if packed.type == "Q8_0" else INT4
        matrix = self._allocate(rows, cols, form, bias)
        source_rows = None
        if packed.num_heads is not None:
            order = torch.arange(rows, dtype=torch.int32).view(packed.num_heads, -1, 2)
            source_rows = order.transpose(1, 2).contiguous().flatten()
        blocks = np.ascontiguousarray(packed.blocks)
        self._library.pack_blocks(
            matrix, BLOCK_TYPES[packed.type], blocks.ctypes.data, blocks.shape[1], source_rows
        )
        return matrix

    def _allocate(self, rows: int, cols: int, form: Form, bias: Tensor | None) -> Matrix:
        group = form.group or -(-cols // 4) * 4
        padded = cols if form.kind == WEIGHTS_FLOAT32 else -(-cols // group) * group
        panels = -(-rows // PANEL)
        bits = {WEIGHTS_FLOAT32: 32, WEIGHTS_INT8: 8}.get(form.kind, 4)
        matrix = Matrix(
            kind=form.kind,
            rows=rows,
            cols=cols,
            group=group,
            padded_cols=padded,
            factor=1.0,
            weights=pointer(self._arena.take(panels * PANEL * padded * bits // 8)),
        )
        num_scale_bytes = panels * PANEL * (padded // group) * 2
        if form.kind != WEIGHTS_FLOAT32:
            matrix.scales = pointer(self._arena.take(num_scale_bytes))
        if form.kind == WEIGHTS_INT4:
            matrix.minima = pointer(self._arena.take(num_scale_bytes))
        if form.kind == WEIGHTS_STEPS:
            num_step_bytes = panels * PANEL * (padded // STEP_GROUP) * 2
            matrix.steps = pointer(self._arena.take(num_step_bytes))
        if bias is not None:
            matrix.bias = pointer(self._arena.keep(bias.to(torch.float32)))
        return matrix
