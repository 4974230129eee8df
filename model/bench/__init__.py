"""Measures a card, and the kernels against what the card can do: bytes moved, operations done."""
