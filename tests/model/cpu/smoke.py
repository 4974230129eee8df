"""All operations of a library over awkward sizes, against torch: run under other builds of it.

python -m tests.model.cpu.smoke LIBRARY
"""

import sys
import tempfile
from pathlib import Path

import torch

from model.cpu.library import SOURCE_KINDS, Library
from model.cpu.matrices import (
    FLOAT32,
    INT8,
    INT8_BY_32,
    INT8_BY_64,
    STEPS_BY_64,
    STEPS_BY_128,
    Arena,
    Packer,
    Rotation,
)
from model.cpu.network import Quantization
from tests.model.cpu.drive import load_native, multiply, quantize, unpack
from tests.model.cpu.test_network import WIDTHS, prompt_of
from tests.model.drive import load_network, logits_alone
from tests.toy import write_toy_checkpoint

SCHEMES: tuple[tuple[Quantization, torch.dtype | None, float], ...] = (
    ("none", None, 1e-4),
    ("none", torch.int8, 0.05),
    ("int8", None, 0.15),
    ("int4", None, 0.8),
)


def check_products(library: Library) -> None:
    arena = Arena()
    packer = Packer(library, arena)
    for form in (FLOAT32, INT8, INT8_BY_32, INT8_BY_64, STEPS_BY_64, STEPS_BY_128):
        for num_outputs, num_inputs in ((1, 1), (17, 172), (37, 100)):
            matrix = packer.pack(torch.randn(num_outputs, num_inputs), form)
            x = torch.randn(7, num_inputs)
            rows = quantize(library, x, matrix)
            seen = x
            if form is not FLOAT32:
                codes = rows.codes.view(7, -1, matrix.group) * rows.scales[:, :, None]
                seen = codes.flatten(1)[:, :num_inputs]
            expected = seen @ unpack(library, matrix).T
            assert torch.allclose(multiply(library, rows, [matrix], 7), expected, atol=1e-3)


def check_reading(library: Library) -> None:
    """Weights of each dtype, scaled and rotated; none is read beyond the end of its memory."""
    arena = Arena()
    packer = Packer(library, arena)
    for size in (1, 20, 172, 576):
        rotation = Rotation(library, arena, size, seed=1)
        q = rotation.rows(torch.eye(size)).T
        for dtype in SOURCE_KINDS:
            for count in (3, 37):
                reader, writer = torch.randn(count, size), torch.randn(size, count)
                reader, writer, norm = reader.to(dtype), writer.to(dtype), torch.randn(size)
                cases = (
                    (packer.pack(reader, FLOAT32), reader.float()),
                    (
                        packer.pack(reader, FLOAT32, columns=norm, inputs=rotation),
                        reader.float() * norm @ q.T,
                    ),
                    (packer.pack(writer, FLOAT32, outputs=rotation), q @ writer.float()),
                )
                for matrix, expected in cases:
                    assert torch.allclose(unpack(library, matrix), expected, atol=1e-4)


def check_networks(library: Library) -> None:
    for overrides in ({}, {"attention_bias": True, "mlp_bias": True}, *WIDTHS.values()):
        with tempfile.TemporaryDirectory() as folder:
            write_toy_checkpoint(Path(folder), **overrides)
            config, reference = load_network(Path(folder))
            prompt = prompt_of(config, 70)
            expected = logits_alone(config, reference, prompt)
            for quantization, kv_dtype, allowed in SCHEMES:
                _, network = load_native(Path(folder), library, quantization, kv_dtype)
                found = logits_alone(config, network, prompt)
                assert (found - expected).norm() < allowed * expected.norm(), (
                    overrides,
                    quantization,
                    kv_dtype,
                )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    loaded = Library(Path(sys.argv[1]), 2)
    check_products(loaded)
    check_reading(loaded)
    check_networks(loaded)
    sys.stdout.write("all equal\n")
