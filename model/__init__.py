"""The model on its device: weights in, tokens out.

Owns every tensor. Knows nothing of requests, queues, asyncio or HTTP.

Letters used for dimensions throughout: T tokens in a step, S sequences in a step,
N rows of logits, H query heads, K key/value heads, D head dim, L layers, V vocabulary,
B blocks in the pool, P positions in a block (block size).
"""
