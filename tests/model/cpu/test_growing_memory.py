"""Memory for K/V: zeroed, and with pages a way ahead of what is used."""

import mmap

import pytest
import torch

from model.cpu.memory import GrowingMemory

MIB = 1 << 20


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor that have pages, by /proc."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel()
    pages = 0
    with open("/proc/self/pagemap", "rb") as file:
        first = start // mmap.PAGESIZE
        file.seek(first * 8)
        entries = file.read((end // mmap.PAGESIZE - first) * 8)
    for at in range(7, len(entries), 8):
        pages += entries[at] >> 7  # the highest bit: present
    return pages * mmap.PAGESIZE


def settle(memory: GrowingMemory) -> None:
    if memory._thread is not None:
        memory._thread.join()


@pytest.fixture
def memory():
    memory = GrowingMemory(64 * MIB, ahead_bytes=8 * MIB)
    settle(memory)
    if not resident_bytes(memory.tensor):
        pytest.skip("this kernel gives no pages ahead")
    return memory


def test_pages_are_there_before_use_and_no_more_than_asked_for(memory):
    assert 8 * MIB <= resident_bytes(memory.tensor) <= 10 * MIB
    assert not memory.tensor[: 8 * MIB].any()


def test_pages_stay_ahead_of_use(memory):
    memory.use(3 * MIB)  # more than half of what was made ready is left
    settle(memory)
    assert resident_bytes(memory.tensor) <= 10 * MIB
    memory.use(20 * MIB)
    settle(memory)
    assert memory._ready_bytes == 28 * MIB
    assert resident_bytes(memory.tensor[8 * MIB :]) >= 20 * MIB


def test_the_end_is_the_end(memory):
    memory.tensor[: 64 * MIB] = 7
    memory.use(64 * MIB)
    settle(memory)
    assert memory.tensor.min() == 7


def test_small_and_empty_memory_can_be_had():
    for size in (0, 1, 4097):
        memory = GrowingMemory(size, ahead_bytes=MIB)
        memory.use(size)
        settle(memory)
        assert memory.tensor.numel() == size
        assert not memory.tensor.any()
