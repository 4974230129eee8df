"""The block allocator on its own: references, reuse, eviction order, collisions."""

import pytest

from app.engine.blocks import Block, BlockAllocator, BlockHasher

ROOT = b"root"


def make_cached(allocator: BlockAllocator, keys: list[bytes]) -> list[Block]:
    """Allocate a chain of blocks, register each under its key."""
    blocks = allocator.allocate(len(keys))
    parent = ROOT
    for number, (block, key) in enumerate(zip(blocks, keys, strict=True)):
        allocator.register(block, key, parent, (number,))
        parent = key
    return blocks


def test_released_block_is_found_again_until_it_is_reused():
    allocator = BlockAllocator(2, block_size=1)
    blocks = make_cached(allocator, [b"a"])
    allocator.release(blocks)
    assert allocator.lookup(b"a", ROOT, (0,)) is blocks[0]
    allocator.allocate(2)
    assert allocator.lookup(b"a", ROOT, (0,)) is None


def test_tail_of_a_chain_is_evicted_before_its_head():
    allocator = BlockAllocator(3, block_size=1)
    head, middle, tail = make_cached(allocator, [b"a", b"b", b"c"])
    allocator.release([head, middle, tail])
    assert allocator.allocate(1) == [tail]
    assert allocator.allocate(1) == [middle]
    assert allocator.lookup(b"a", ROOT, (0,)) is head


def test_least_recently_released_chain_is_evicted_first():
    allocator = BlockAllocator(2, block_size=1)
    old = make_cached(allocator, [b"a"])
    new = make_cached(allocator, [b"b"])
    allocator.release(new)
    allocator.release(old)
    assert allocator.allocate(1) == new


def test_blocks_without_content_are_used_before_any_cached_one():
    allocator = BlockAllocator(2, block_size=1)
    cached = make_cached(allocator, [b"a"])
    plain = allocator.allocate(1)
    allocator.release(cached)
    allocator.release(plain)
    assert allocator.allocate(1) == plain


def test_shared_block_is_not_free_until_its_last_holder_lets_go():
    allocator = BlockAllocator(1, block_size=1)
    (block,) = make_cached(allocator, [b"a"])
    allocator.share(block)
    allocator.release([block])
    assert allocator.num_free == 0
    allocator.release([block])
    assert allocator.num_free == 1


def test_sharing_a_free_block_takes_it_off_the_free_list():
    allocator = BlockAllocator(1, block_size=1)
    blocks = make_cached(allocator, [b"a"])
    allocator.release(blocks)
    allocator.share(blocks[0])
    assert allocator.num_free == 0
    allocator.check_integrity([blocks])


def test_colliding_key_is_not_a_hit_when_ids_or_parent_differ():
    allocator = BlockAllocator(2, block_size=1)
    make_cached(allocator, [b"a"])
    assert allocator.lookup(b"a", ROOT, (1,)) is None
    assert allocator.lookup(b"a", b"other", (0,)) is None
    assert allocator.lookup(b"a", ROOT, (0,)) is not None


def test_second_block_with_the_same_content_stays_out_of_the_cache():
    allocator = BlockAllocator(2, block_size=1)
    (first,) = make_cached(allocator, [b"a"])
    (second,) = make_cached(allocator, [b"a"])
    assert allocator.lookup(b"a", ROOT, (0,)) is first
    assert second.key is None


def test_forgotten_content_is_never_found():
    allocator = BlockAllocator(2, block_size=1)
    make_cached(allocator, [b"a", b"b"])
    allocator.forget_all()
    assert allocator.lookup(b"a", ROOT, (0,)) is None
    assert allocator.lookup(b"b", b"a", (1,)) is None


def test_integrity_check_notices_a_lost_block():
    allocator = BlockAllocator(2, block_size=1)
    allocator.allocate(1)
    with pytest.raises(AssertionError):
        allocator.check_integrity([])


def test_integrity_check_notices_a_block_held_but_free():
    allocator = BlockAllocator(2, block_size=1)
    with pytest.raises(AssertionError):
        allocator.check_integrity([[allocator.blocks[0]]])


def test_keys_differ_by_salt_adapter_parent_and_ids():
    hasher = BlockHasher()
    roots = {hasher.root(None, ""), hasher.root(None, "s"), hasher.root(1, ""), hasher.root(1, "s")}
    assert len(roots) == 4
    keys = {hasher.key(root, ids) for root in roots for ids in ([1, 2], [2, 1])}
    assert len(keys) == 8


def test_keys_of_two_processes_differ():
    assert BlockHasher().root(None, "") != BlockHasher().root(None, "")
