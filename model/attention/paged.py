"""Paged attention in plain torch: the reference, and the path where nothing faster is at hand.

Softmax over all earlier keys is taken online (Milakov and Gimelshein, arXiv 1805.02867), over
blocks of exactly `KEY_BLOCK` keys from position 0 on; queries are cut into tiles of exactly
`QUERY_ROWS` rows, a row being one query head of one position. All tiles of the step, whatever
sequence they belong to, go through a key block in one batched product: the loop runs over key
blocks, not over sequences, and gathers K/V for one key block at a time.

A row's sums are therefore taken over the same products in the same order whoever else is in the
batch, wherever its chunk was cut, and whether it was a prompt's or a sampled token. A key block
beyond a row's own position changes nothing: its weights are exactly zero.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.attention.backend import Attend
from model.config import ModelConfig
from model.kv_pool import KVPool
from model.layers.rotary import RotaryEmbedding, rotate
from model.network import StepInputs
from model.transfer import send, upload_ids

KEY_BLOCK = 256
QUERY_ROWS = 16


@dataclass(frozen=True, slots=True)
class _KeyBlock:
    """The tiles that reach one block of keys, and where its K/V lies.

    Tiles are ordered by falling length, so they are the first `num_tiles`.
    """

    num_tiles: int
    slots: Tensor  # [num_tiles * KEY_BLOCK] int32
    is_hidden: Tensor | None  # [num_tiles, rows, KEY_BLOCK]: keys after a row's position, if any


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where a step's queries and keys are; the same for every layer."""

    rotation: tuple[Tensor, Tensor]  # cosines and sines [T, 1, D], float32
    write_slots: Tensor  # [T]: where each token's K/V goes
    query_tokens: Tensor  # [tiles * positions a tile]: index into T; the padding's is 0
    token_rows: Tensor  # [T]: where a token's result lies among tiles * positions
    key_blocks: list[_KeyBlock]


class PagedAttention:
    """Grouped-query attention of a step's tokens over their sequences' K/V."""

    def __init__(self, config: ModelConfig, pool: KVPool, rotary: RotaryEmbedding) -> None:
        self._pool = pool
        self._rotary = rotary
        self._splits = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._num_kv_heads = config.num_kv_heads
        self._group = config.num_heads // config.num_kv_heads
        self._head_dim = config.head_dim
        self._tile_positions = max(1, QUERY_ROWS // self._group)
        rows = self._tile_positions * self._group
        self._num_rows = -(-rows // QUERY_ROWS) * QUERY_ROWS
        self._scale = 1.0 / math.sqrt(config.head_dim)

    def plan(self, inputs: StepInputs) -> Attend:
        """Cut the step's queries into tiles and find the slots of their keys."""
        return partial(self._attend, self._cut(inputs))

    def _cut(self, inputs: StepInputs) -> _Plan:
        device = inputs.positions.device
        width = self._tile_positions
        tiles = []  # (length, sequence, first token, tokens)
        for sequence, seq_len in enumerate(inputs.seq_lens):
            start, end = inputs.query_starts[sequence], inputs.query_starts[sequence + 1]
            first_position = seq_len - (end - start)
            for first in range(start, end, width):
                count = min(width, end - first)
                length = first_position + (first - start) + count
                tiles.append((length, sequence, first, count))
        tiles.sort(key=lambda tile: -tile[0])
        lengths = [tile[0] for tile in tiles]
        first_tokens = torch.tensor([tile[2] for tile in tiles])
        counts = torch.tensor([tile[3] for tile in tiles])
        offsets = torch.arange(width)
        is_real = offsets < counts[:, None]  # [tiles, positions]
        query_tokens = torch.where(is_real, first_tokens[:, None] + offsets, 0)
        token_rows = torch.zeros(inputs.positions.shape[0], dtype=torch.int64)
        token_rows[query_tokens[is_real]] = is_real.flatten().nonzero().squeeze(1)
        query_tokens = send(query_tokens, device)
        positions = inputs.positions[query_tokens]  # [tiles, positions]
        tables = inputs.block_tables[upload_ids([tile[1] for tile in tiles], device)]
        first_position = min(length - tile[3] for length, tile in zip(lengths, tiles, strict=True))
        key_blocks = []
        for first_key in range(0, lengths[0], KEY_BLOCK):
            num_tiles = sum(length > first_key for length in lengths)
            limits = upload_ids(lengths[:num_tiles], device)
            slots = self._key_slots(first_key, limits, tables[:num_tiles])
            # Far behind a long prompt's last chunk nothing is hidden, and no mask is kept.
            is_open = first_key + KEY_BLOCK <= first_position + 1
            is_hidden = None if is_open else self._hidden_keys(first_key, positions[:num_tiles])
            key_blocks.append(_KeyBlock(num_tiles, slots, is_hidden))
        write_slots = torch.where(inputs.slots < 0, self._pool.trash_slot, inputs.slots)
        token_rows = send(token_rows, device)
        return _Plan(
            self._rotary.gather(inputs.positions),
            write_slots,
            query_tokens.flatten(),
            token_rows,
            key_blocks,
        )

    def _key_slots(self, first_key: int, limits: Tensor, tables: Tensor) -> Tensor:
        """Return the slots [tiles * KEY_BLOCK] of a block of keys; those past a tile are zeros."""
        size = self._pool.block_size
        keys = torch.arange(first_key, first_key + KEY_BLOCK, device=tables.device)
        blocks = tables[:, (keys // size).clamp(max=tables.shape[1] - 1)]
        is_real = keys < limits[:, None]
        slots = torch.where(is_real, blocks * size + keys % size, self._pool.zero_slot)
        return slots.flatten().to(torch.int32)

    def _hidden_keys(self, first_key: int, positions: Tensor) -> Tensor:
        """Return which of a block of keys lie after the position of each row of each tile."""
        keys = torch.arange(first_key, first_key + KEY_BLOCK, device=positions.device)
        rows = positions.repeat_interleave(self._group, dim=1)
        rows = torch.nn.functional.pad(rows, (0, self._num_rows - rows.shape[1]))
        return keys > rows[:, :, None]

    def _attend(self, plan: _Plan, layer: int, qkv: Tensor) -> Tensor:
        """Rotate, write, attend.

        All keys and values are written before any is read: rows of one step may share blocks.
        """
        queries, keys, values = torch.split(qkv, self._splits, dim=1)
        rotation = tuple(each.to(qkv.dtype) for each in plan.rotation)
        queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        self._pool.write(layer, plan.write_slots, keys, values)
        tiles = self._tile(queries, plan)  # [K, tiles, rows, D]
        best = tiles.new_full((*tiles.shape[:3], 1), -torch.inf, dtype=torch.float32)
        total = torch.zeros_like(best)
        output = torch.zeros_like(tiles, dtype=torch.float32)
        for block in plan.key_blocks:
            n = block.num_tiles
            # [K, n * KEY_BLOCK, D]
            keys, values = self._pool.read(layer, block.slots, queries.dtype)
            scores = self._multiply(tiles[:, :n], keys.view(-1, KEY_BLOCK, self._head_dim).mT)
            if block.is_hidden is not None:
                scores.masked_fill_(block.is_hidden, -torch.inf)
            new_best = torch.maximum(best[:, :n], scores.amax(-1, keepdim=True))
            weights = scores.sub_(new_best).exp_()
            keep = (best[:, :n] - new_best).exp_()
            best[:, :n] = new_best
            total[:, :n].mul_(keep).add_(weights.sum(-1, keepdim=True))
            values = values.view(-1, KEY_BLOCK, self._head_dim)
            output[:, :n].mul_(keep).add_(self._multiply(weights.to(values.dtype), values))
        return self._untile(output.div_(total), plan).to(queries.dtype).flatten(1)

    def _multiply(self, tiles: Tensor, columns: Tensor) -> Tensor:
        """Return tiles [K, n, rows, M] @ columns [K * n, M, C] as float32 [K, n, rows, C]."""
        product = torch.bmm(tiles.flatten(0, 1), columns).to(torch.float32)
        return product.view(*tiles.shape[:2], *product.shape[1:])

    def _tile(self, queries: Tensor, plan: _Plan) -> Tensor:
        """Arrange queries as [K, tiles, rows, D], rows padded with zeros."""
        width, group, dim = self._tile_positions, self._group, self._head_dim
        tiles = queries.index_select(0, plan.query_tokens) * self._scale
        tiles = tiles.view(-1, width, self._num_kv_heads, group, dim).permute(2, 0, 1, 3, 4)
        tiles = tiles.reshape(self._num_kv_heads, -1, width * group, dim)
        return torch.nn.functional.pad(tiles, (0, 0, 0, self._num_rows - width * group))

    def _untile(self, output: Tensor, plan: _Plan) -> Tensor:
        """Bring [K, tiles, rows, D] back to [T, H, D]."""
        width, group, dim = self._tile_positions, self._group, self._head_dim
        output = output[:, :, : width * group].reshape(self._num_kv_heads, -1, width, group, dim)
        output = output.permute(1, 2, 0, 3, 4).reshape(-1, self._num_kv_heads * group, dim)
        return output.index_select(0, plan.token_rows)
