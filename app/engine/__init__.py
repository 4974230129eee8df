"""Policy: which sequence runs, which blocks it holds. Knows no tensors, text or HTTP."""
