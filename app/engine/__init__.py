"""Policy: which sequence runs, which blocks it holds. Pure Python; knows no tensors, text or HTTP."""
