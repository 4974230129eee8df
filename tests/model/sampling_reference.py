"""The sampler as one would write it down: one row, one rule after the other, in float64.

Knows nothing of batches or speed. Because its probabilities are not rounded as the sampler's
are, it also says by how much its choice was clear.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from model.sampling.edits import SampleRow
from model.sampling.philox import uniforms


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A token, None for a broken row, and how far the nearest decision was from another."""

    token_id: int | None
    margin: float


def edit(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """Return the logits of one row after masks, bias and penalties."""
    x = logits.astype(np.float32).copy()
    vocab_size = len(x)
    s = row.sampling
    log = row.token_log.tolist()
    output = log[row.num_prompt_tokens :]
    for i in range(vocab_size):
        if row.mask is not None and not (int(row.mask[i // 32]) >> (i % 32)) & 1:
            x[i] = -np.inf
        if s.allowed_token_ids is not None and i not in s.allowed_token_ids:
            x[i] = -np.inf
        if len(output) < s.min_tokens and i in s.stop_token_ids:
            x[i] = -np.inf
    for *before, last in s.bad_words_token_ids:
        if not before or log[-len(before) :] == before:
            x[last] = -np.inf
    for i, bias in s.logit_bias:
        x[i] += np.float32(bias)
    for i in set(log):
        if x[i] > 0:
            x[i] /= np.float32(s.repetition_penalty)
        else:
            x[i] *= np.float32(s.repetition_penalty)
    for i in set(output):
        x[i] -= np.float32(s.frequency_penalty) * np.float32(output.count(i))
        x[i] -= np.float32(s.presence_penalty)
    return x


def choose(logits: np.ndarray, row: SampleRow) -> Choice:
    """Return the token of one row."""
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return Choice(token_id=None, margin=math.inf)
    x = edit(logits, row)
    if np.isneginf(x).all():
        return Choice(token_id=None, margin=math.inf)
    s = row.sampling
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if s.is_greedy:
        return Choice(token_id=order[0], margin=math.inf)

    margin = math.inf
    scaled = (x.astype(np.float64) - x.max()) / s.temperature
    p = np.exp(scaled)
    for i in range(len(x)):
        if p[i] != s.min_p:
            margin = min(margin, abs(p[i] - s.min_p)) if s.min_p else margin
        if p[i] < s.min_p:
            p[i] = 0.0
    if s.top_k:
        for i in order[s.top_k :]:
            p[i] = 0.0
    p /= p.sum()
    if s.top_p < 1.0:
        reached = 0.0
        for rank, i in enumerate(order):
            if rank and reached >= s.top_p:
                p[i] = 0.0
            else:
                reached += p[i]
                margin = min(margin, abs(reached - s.top_p))
        p /= p.sum()
    u = float(uniforms([s.seed], [s.choice], [row.position])[0])
    cdf = np.cumsum(p)
    token_id = int(np.flatnonzero(cdf > u)[0])
    below = cdf[token_id - 1] if token_id else -math.inf
    edges = [u - below] if below > 0 else []
    if cdf[token_id] < 1.0 - 1e-9:
        edges.append(cdf[token_id] - u)
    return Choice(token_id=token_id, margin=float(min([margin, *edges])))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))


def to_mask(allowed: set[int], vocab_size: int) -> torch.Tensor:
    """Pack allowed ids as constraints do."""
    words = [0] * ((vocab_size + 31) // 32)
    for i in allowed:
        words[i // 32] |= 1 << (i % 32)
    return torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)
