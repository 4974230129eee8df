"""What a row's parameters do to its logits before temperature: masks, bias, penalties.

Works in place on a copy of the rows that ask for it. Forbidden ids become -inf and stay so.
Knows nothing of how a token is then chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.step import SamplingParams
from model.transfer import upload, upload_ids

_FORBIDDEN = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One row of logits that is sampled."""

    sampling: SamplingParams
    position: int  # of the token to be sampled in its sequence
    num_prompt_tokens: int
    token_log: Tensor  # [position] ids on the device: prompt, then output
    mask: Tensor | None = None  # packed int32 words [ceil(V / 32)]; bit i of word w: id 32 w + i

    @property
    def forbids_stops(self) -> bool:
        return self.position - self.num_prompt_tokens < self.sampling.min_tokens

    @property
    def has_penalty(self) -> bool:
        s = self.sampling
        return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def edits_logits(self) -> bool:
        """Whether the row's logits are chosen from in any other form than they came."""
        s = self.sampling
        return (
            self.mask is not None
            or s.allowed_token_ids is not None
            or bool(s.bad_words_token_ids)
            or (self.forbids_stops and bool(s.stop_token_ids))
            or bool(s.logit_bias)
            or self.has_penalty
        )


def edit_logits(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply masks, then logit bias, then penalties to logits [N, V] in place."""
    _apply_constraints(logits, rows)
    _keep_allowed(logits, rows)
    _forbid_ids(logits, rows)
    _forbid_bad_words(logits, rows)
    _add_bias(logits, rows)
    _penalise(logits, rows)


def _apply_constraints(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    vocab_size = logits.shape[1]
    indices: list[int] = []
    masks: list[Tensor] = []
    for index, row in enumerate(rows):
        if row.mask is not None:
            indices.append(index)
            masks.append(row.mask)
    if not masks:
        return
    if logits.device.type != "cpu":
        forbid_by_masks(logits, upload_ids(indices, logits.device), torch.stack(masks))
        return
    for index, mask in zip(indices, masks, strict=True):  # several times as fast on a CPU
        forbidden = np.unpackbits(
            (~mask).numpy().view(np.uint8), count=vocab_size, bitorder="little"
        )
        np.copyto(logits[index].numpy(), _FORBIDDEN, where=forbidden.view(np.bool_))


def forbid_by_masks(logits: Tensor, where: Tensor, masks: Tensor) -> None:
    """Apply packed masks [M, words] to the rows `where` [M] of logits, in as few launches for all.

    Bit by bit in bytes: an eighth of the memory that int64 would take.
    """
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    is_allowed = (masks.view(torch.uint8)[:, :, None] & bits).view(len(masks), -1)
    edited = logits.index_select(0, where)
    edited.masked_fill_(is_allowed[:, : logits.shape[1]] == 0, _FORBIDDEN)
    logits.index_copy_(0, where, edited)


def _keep_allowed(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    vocab_size = logits.shape[1]
    for index, row in enumerate(rows):
        if row.sampling.allowed_token_ids is not None:
            allowed = [i for i in row.sampling.allowed_token_ids if 0 <= i < vocab_size]
            ids = upload_ids(allowed, logits.device)
            kept = logits[index].index_select(0, ids)
            logits[index].fill_(_FORBIDDEN).index_copy_(0, ids, kept)


def _forbid_ids(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Forbid ends of text before min_tokens, and bad words of one id."""
    vocab_size = logits.shape[1]
    where: list[int] = []
    for index, row in enumerate(rows):
        ids = {word[0] for word in row.sampling.bad_words_token_ids if len(word) == 1}
        if row.forbids_stops:
            ids |= row.sampling.stop_token_ids
        where += [index * vocab_size + i for i in ids if 0 <= i < vocab_size]
    if where:
        logits.view(-1).index_fill_(0, upload_ids(where, logits.device), _FORBIDDEN)


def _forbid_bad_words(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Forbid the last id of a bad word of several where the log ends with the ids before it."""
    for index, row in enumerate(rows):
        log = row.token_log
        words = [
            word
            for word in row.sampling.bad_words_token_ids
            if 1 < len(word) <= len(log) + 1 and min(word) >= 0 and word[-1] < logits.shape[1]
        ]
        if not words:
            continue
        # Shorter words are filled up on the left with -1, which matches anything.
        width = max(len(word) for word in words) - 1
        filled = [i for word in words for i in (-1,) * (width + 1 - len(word)) + word[:-1]]
        before = upload_ids(filled, log.device).view(-1, width)
        is_begun = ((before == log[len(log) - width :]) | (before < 0)).all(-1)
        # Added, not written: several words may have the same last id.
        bans = torch.zeros(len(words), dtype=logits.dtype, device=logits.device)
        bans.masked_fill_(is_begun, _FORBIDDEN)
        logits[index].index_add_(0, upload_ids([word[-1] for word in words], log.device), bans)


def _add_bias(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    vocab_size = logits.shape[1]
    where: list[int] = []
    biases: list[float] = []
    for index, row in enumerate(rows):
        for token_id, bias in row.sampling.logit_bias:
            if 0 <= token_id < vocab_size:
                where.append(index * vocab_size + token_id)
                biases.append(bias)
    if where:
        logits.view(-1).index_add_(
            0,
            upload_ids(where, logits.device),
            upload(biases, logits.dtype, logits.device),
        )


def _penalise(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply repetition, frequency and presence penalties, in vLLM's order.

    Only the logits of ids in the log are touched. An id that occurs often is computed as often,
    each time to the same value, so it does not matter which of them is written last. Neutral
    penalties change no bit, so rows may be padded together.
    """
    indices: list[int] = []
    logs: list[Tensor] = []
    num_prompts: list[int] = []  # how much of each log is prompt
    for index, row in enumerate(rows):
        skipped = row.num_prompt_tokens if row.sampling.repetition_penalty == 1.0 else 0
        if row.has_penalty and len(row.token_log) > skipped:
            indices.append(index)
            logs.append(row.token_log[skipped:])
            num_prompts.append(row.num_prompt_tokens - skipped)
    if not indices:
        return

    def column(values: list[float]) -> Tensor:
        return upload(values, logits.dtype, logits.device)[:, None]

    sampling = [rows[index].sampling for index in indices]
    ids = pad_sequence(logs, batch_first=True, padding_value=-1).long()
    is_padding = ids < 0
    ids = torch.where(is_padding, ids[:, :1], ids)
    order = torch.arange(ids.shape[1], device=ids.device)
    is_output = (order >= upload_ids(num_prompts, ids.device)[:, None]) & ~is_padding

    where = upload_ids(indices, logits.device)
    edited = logits.index_select(0, where)
    values = edited.gather(1, ids)
    repetition = column([s.repetition_penalty for s in sampling])
    values = torch.where(values > 0, values / repetition, values * repetition)
    if any(s.frequency_penalty or s.presence_penalty for s in sampling):
        counts = torch.zeros_like(edited).scatter_add_(1, ids, is_output.to(logits.dtype))
        counts = counts.gather(1, ids)
        values -= column([s.frequency_penalty for s in sampling]) * counts
        values -= column([s.presence_penalty for s in sampling]) * (counts > 0)
    logits.index_copy_(0, where, edited.scatter_(1, ids, values))
