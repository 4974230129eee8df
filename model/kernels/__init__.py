"""Triton kernels of the GPU path, one small file each, beside the torch reference that it equals.

Modules in here import triton at their top, so nothing outside imports them at its own:
`model/operations.py` does so lazily, once it knows that a CUDA device and triton are there.

Integers that change from step to step are marked `do_not_specialize`, because Triton would
compile a kernel anew, in the middle of serving, for the first one that is 1 or no multiple of 16.
Tile sizes come from tables and are never tuned at run time: what a kernel computes may not
depend on what the first request happened to be.
"""
