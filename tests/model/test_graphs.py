"""Which parts of decode steps are captured, and when: over a recorder that repeats Python calls."""

import itertools
import logging
from collections.abc import Callable

import pytest

from model.graphs import CAPTURE_SHARE, DecodeGraphs, Part, Replay, decode_sizes

CAPTURE_S = 2.0


class Recorder:
    """Records by running once, which takes `CAPTURE_S` of the bench's clock."""

    def __init__(self, bench: "Bench", max_captures: int) -> None:
        self._bench = bench
        self._num_left = max_captures

    def capture(self, run: Callable[[], None]) -> Replay:
        if not self._num_left:
            raise RuntimeError("out of memory")
        self._num_left -= 1
        run()
        launched = self._bench.launched[-1]
        self._bench.now_s += CAPTURE_S
        return lambda: self._bench.replayed.append(launched)


class Bench:
    """Graphs over steps whose parts note what they are and their size."""

    def __init__(self, sizes: list[int], max_captures: int = 1000) -> None:
        self.now_s = 100.0
        self.launched: list[tuple[Part, int]] = []
        self.replayed: list[tuple[Part, int]] = []
        self.num_cleared = 0
        recorder = Recorder(self, max_captures)
        self.graphs = DecodeGraphs(
            lambda part, size: self.launched.append((part, size)),
            self._clear,
            sizes,
            recorder,
            lambda: self.now_s,
        )

    def _clear(self) -> None:
        self.num_cleared += 1

    def captures(
        self, wanted: list[int], parts: tuple[Part, ...] = ("forward",)
    ) -> list[tuple[Part, int]]:
        """Return what is captured while steps of the wanted numbers of rows go by, unhurried."""
        self.launched.clear()
        for num_rows in wanted:
            self.graphs.capture_next(num_rows, parts)
            self.now_s += 1000
        return list(self.launched)


@pytest.mark.parametrize("row_tile", [1, 16])
@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 100, 256, 257, 288, 300, 1024])
def test_every_number_of_sequences_has_a_size_and_the_largest_is_the_most(most, row_tile):
    sizes = decode_sizes(most, row_tile)
    assert sizes == sorted(set(sizes))
    assert not any(size % row_tile for size in sizes)
    assert most <= sizes[-1] < most + row_tile
    graphs = Bench(sizes).graphs
    for num_rows in range(1, most + 1):
        assert graphs.padded(num_rows) == min(size for size in sizes if size >= num_rows)


def test_the_largest_is_captured_first_then_what_is_wanted_then_the_rest():
    bench = Bench([1, 2, 4, 8])
    order = [("forward", size) for size in (8, 2, 4, 1)]
    assert bench.captures([1, 2, 2, 2, 2, 2]) == order
    assert bench.graphs.num_captured == 4
    assert bench.num_cleared == 4


def test_parts_are_captured_once_they_are_needed_the_forward_pass_before_the_draw():
    bench = Bench([1, 8])
    assert bench.captures([1, 1, 1], ("forward", "greedy")) == [
        ("forward", 8),
        ("forward", 1),
        ("greedy", 1),
    ]
    assert bench.captures([1, 1, 1, 1], ("forward", "top_p")) == [
        ("top_p", 1),
        ("greedy", 8),
        ("top_p", 8),
    ]
    assert bench.captures([8], ("forward",)) == []


def test_a_size_is_replayed_once_it_was_captured():
    bench = Bench([1, 8])
    bench.captures([1])
    bench.launched.clear()
    bench.graphs.run("forward", 1)
    bench.graphs.run("forward", 8)
    bench.graphs.run("greedy", 8)
    assert bench.launched == [("forward", 1), ("greedy", 8)]
    assert bench.replayed == [("forward", 8)]


def test_capturing_takes_no_more_than_its_share_of_the_time():
    bench = Bench([1, 2, 4, 8])
    starts_s = []
    while bench.graphs.num_captured < 4:
        before_s, num_captured = bench.now_s, bench.graphs.num_captured
        bench.graphs.capture_next(1, ("forward",))
        if bench.graphs.num_captured > num_captured:
            starts_s.append(before_s)
        bench.now_s += 0.25
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(starts_s)]
    assert len(gaps_s) == 3
    assert min(gaps_s) >= CAPTURE_S / CAPTURE_SHARE


def test_a_capture_that_fails_is_the_last_and_steps_go_on(caplog):
    bench = Bench([1, 2, 4, 8], max_captures=1)
    with caplog.at_level(logging.WARNING):
        bench.captures([1, 1, 1])
    assert bench.graphs.num_captured == 1
    assert [record.getMessage() for record in caplog.records] == [
        "no graph of 1 sequences, nor of what has none yet: out of memory"
    ]
    bench.launched.clear()
    bench.graphs.run("forward", 1)
    bench.graphs.run("forward", 8)
    assert (bench.launched, bench.replayed) == ([("forward", 1)], [("forward", 8)])


def test_all_that_are_missing_are_captured_at_once_if_asked_for():
    bench = Bench([1, 2, 4, 8])
    bench.graphs.capture_next(2, ("forward", "greedy"))
    bench.graphs.capture_all()
    parts = [(part, size) for part in ("forward", "greedy") for size in (1, 2, 4, 8)]
    assert sorted(bench.launched) == parts
    bench.graphs.capture_all()
    assert bench.graphs.num_captured == 8


def test_capturing_all_ends_where_there_is_no_room():
    bench = Bench([1, 2, 4, 8], max_captures=2)
    bench.graphs.capture_next(2, ("forward",))
    bench.graphs.capture_all()
    assert bench.graphs.num_captured == 2
