"""Every kernel builds for Ampere, Hopper and Blackwell, with no card at hand.

Ampere (8.0) has no fp8 type: there kernels take fp8 as bytes and decode it in integer arithmetic.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KERNELS = {
    "add_rms_norm_kernel",
    "collect_kernel",
    "count_splits_kernel",
    "levels_kernel",
    "look_up_kernel",
    "matmul_kernel",
    "maxima_kernel",
    "merge_splits_kernel",
    "paged_decode_kernel",
    "paged_prefill_kernel",
    "pick_kernel",
    "quantize_kernel",
    "rope_write_kernel",
    "score_kernel",
    "silu_mul_fp8_kernel",
    "silu_mul_kernel",
    "sums_kernel",
    "threshold_kernel",
}
SMALLEST_SHARED_BYTES = 99 * 1024  # of a block, of all cards of capability 8.0 and up
ESSENTIAL = [
    "8B",
    "8B, fp8 K/V",
    "hidden 4096",
    "sampling of 128256",
    "invariant product",
    "invariant product, fp8",
    "looking up",
]
ON_HOPPER = [*ESSENTIAL, "8B, invariant", "heads of 256"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability, full, request):
    pytest.importorskip("triton")
    names = [] if full else ON_HOPPER if capability == 90 else ESSENTIAL
    cache = request.config.cache.mkdir("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.model.kernels.compile_kernels", str(capability)]
    run = subprocess.run(
        [*command, *names], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert {record["kernel"] for record in records} == KERNELS
    for record in records:
        assert record["cubin_bytes"] > 0
        assert record["shared_bytes"] <= SMALLEST_SHARED_BYTES, record
