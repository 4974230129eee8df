"""Who holds which K/V block: reference counts, the prefix cache, least-recently-used eviction.

Knows blocks and token ids; not what lies in a block, nor why somebody wants one.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from secrets import token_bytes

Key = bytes


@dataclass(slots=True, eq=False)
class Block:
    """One block of the pool. `key`, `parent` and `token_ids` are set while it is in the cache."""

    block_id: int
    ref_count: int = 0
    key: Key | None = None
    parent: Key | None = None
    token_ids: tuple[int, ...] = ()


class BlockHasher:
    """Chained keys of full blocks: a key stands for a block's ids and for all before them.

    Keyed by a secret of this process, so that nobody can craft a collision; ids and parent are
    compared on a hit all the same. Adapter and salt are the root of the chain: K/V is never
    shared across them.
    """

    def __init__(self) -> None:
        self._secret = token_bytes(32)

    def root(self, adapter: int | None, cache_salt: str) -> Key:
        origin = f"{adapter}\0{cache_salt}".encode("utf-8", "surrogatepass")
        return blake2b(origin, key=self._secret, digest_size=16).digest()

    def key(self, parent: Key, token_ids: Sequence[int]) -> Key:
        content = parent + array("I", token_ids).tobytes()
        return blake2b(content, key=self._secret, digest_size=16).digest()


class BlockAllocator:
    """Hand out blocks and take them back; keep the content of the free ones for reuse.

    A block is *free* when nobody refers to it. A free block with a key can still be found by
    `lookup`; it is overwritten when it is the least recently used. Blocks without a key are
    used up before any that has one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._free: OrderedDict[int, Block] = OrderedDict((b.block_id, b) for b in self.blocks)
        self._cached: dict[Key, Block] = {}

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[Block]:
        """Take `count` blocks, each with one reference. The caller has checked `num_free`."""
        assert count <= self.num_free
        taken = []
        for _ in range(count):
            _, block = self._free.popitem(last=False)
            self.forget(block)
            block.ref_count = 1
            taken.append(block)
        return taken

    def share(self, block: Block) -> None:
        """Add a reference to a block that `lookup` found."""
        if block.ref_count == 0:
            del self._free[block.block_id]
        block.ref_count += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """Drop one reference each, the tail of the chain first: it is evicted before its head."""
        for block in reversed(blocks):
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block.block_id] = block
                if block.key is None:
                    self._free.move_to_end(block.block_id, last=False)

    def register(self, block: Block, key: Key, parent: Key, token_ids: tuple[int, ...]) -> None:
        """Make a full block findable, unless another block with the same content already is."""
        if key not in self._cached:
            assert block.key is None
            block.key, block.parent, block.token_ids = key, parent, token_ids
            self._cached[key] = block

    def lookup(self, key: Key, parent: Key, token_ids: tuple[int, ...]) -> Block | None:
        """Find the cached block of these ids behind this parent, compared id by id."""
        block = self._cached.get(key)
        if block is None or block.parent != parent or block.token_ids != token_ids:
            return None
        return block

    def forget(self, block: Block) -> None:
        """Take a block out of the cache: its content will change, or is not to be trusted."""
        if block.key is not None:
            del self._cached[block.key]
            block.key, block.parent, block.token_ids = None, None, ()

    def forget_all(self) -> None:
        """Empty the cache; who holds a block keeps it."""
        for block in list(self._cached.values()):
            self.forget(block)

    def check_integrity(self, holders: Iterable[Sequence[Block]]) -> None:
        """Raise AssertionError unless every block is held or free, and no count is off.

        `holders` are the block lists of all sequences that have any.
        """
        counts = [0] * self.num_blocks
        for blocks in holders:
            ids = [block.block_id for block in blocks]
            assert len(set(ids)) == len(ids), "a sequence holds a block twice"
            for block_id in ids:
                counts[block_id] += 1
        for block, count in zip(self.blocks, counts, strict=True):
            assert block.ref_count == count, f"block {block.block_id}: {block.ref_count} != {count}"
            assert (block.block_id in self._free) == (count == 0), f"block {block.block_id} lost"
            assert block.key is None or self._cached.get(block.key) is block
        assert all(block.key == key for key, block in self._cached.items())
