"""One permanent row a sequence: its token log and block table, on the device.

A step's inputs are gathered from rows, and a sampled id is appended to its row's log without a
detour over the host, so that the next step can be launched before anybody has read it. What the
host adds (prompts, drafts, new blocks) is noted and travels with the step's own numbers, in one
copy a step; what has not changed does not travel.

::

    state: | token logs [R + 1, longest + 1] | block tables [R + 1, blocks] |   int32

The last row is nobody's: places of a padded batch that have no sequence read it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.network import StepInputs
from model.step import NewRow, PlanRow, RunnerLimits, SamplingParams
from model.transfer import Ids, send_all

NOTHING: Ids = np.empty(0, dtype=np.int64)
Array = Tensor | npt.NDArray[np.int32]
"""On a CPU numpy's: what it does to a few numbers costs a quarter of what it costs in torch."""


@dataclass(slots=True)
class RowState:
    """What the host knows of a resident sequence."""

    sampling: SamplingParams
    num_prompt_tokens: int
    reads_log: bool  # whether sampling looks at the tokens before
    num_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Where a step samples, place by place: 1 + drafts for each row that does."""

    rows: Tensor  # [N] whose log the id is appended to
    positions: Tensor  # [N] at which it stands there
    tokens: Tensor | None  # [N] among the step's tokens; None: they are the first N


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredStep:
    """A step on the device."""

    inputs: StepInputs
    samples: Samples | None


class Rows:
    """All rows of a runner, and the gathering of a step's inputs from them."""

    def __init__(self, limits: RunnerLimits, device: torch.device) -> None:
        self._device = device
        self._block_size = limits.block_size
        self.nobody = limits.max_num_seqs
        self._log_len = limits.max_model_len + 1
        self._max_blocks = -(-limits.max_model_len // limits.block_size)
        num_rows = limits.max_num_seqs + 1
        # int32: with a context of 128k and 256 rows, the logs alone are 134 MB.
        self._tables_start = num_rows * self._log_len
        size = self._tables_start + num_rows * self._max_blocks
        self._state = torch.zeros(size, dtype=torch.int32, device=device)
        logs, tables = self._state[: self._tables_start], self._state[self._tables_start :]
        self.token_log = logs.view(num_rows, self._log_len)
        self.block_tables = tables.view(num_rows, self._max_blocks)
        self.no_log = self._state[:0]  # of who does not read it: a slice a row costs as much
        self._flat, self._logs, self._tables = (
            each.numpy() if device.type == "cpu" else each
            for each in (self._state, self.token_log, self.block_tables)
        )
        self._states: dict[int, RowState] = {}
        # Noted, not yet sent: where in the state, and what.
        self._places: list[int] = []
        self._values: list[int] = []

    def __getitem__(self, row: int) -> RowState:
        return self._states[row]

    def remove(self, row: int) -> None:
        """Forget a sequence; its row may hold nothing."""
        self._states.pop(row, None)

    def add(self, new: NewRow) -> None:
        assert new.row not in self._states
        reads_log = _reads_log(new.sampling)
        self._states[new.row] = RowState(new.sampling, new.num_prompt_tokens, reads_log)
        self._note(new.row * self._log_len, new.token_ids)

    def extend(self, plan_row: PlanRow) -> None:
        """Append the plan's new blocks to the row's table, and its drafts to the log."""
        state = self._states[plan_row.row]
        drafts = plan_row.draft_token_ids
        assert plan_row.num_tokens > len(drafts)
        end = plan_row.start + plan_row.num_tokens
        if plan_row.new_block_ids:
            first = self._tables_start + plan_row.row * self._max_blocks + state.num_blocks
            self._note(first, plan_row.new_block_ids)
            state.num_blocks += len(plan_row.new_block_ids)
        assert end <= state.num_blocks * self._block_size
        if drafts:
            self._note(plan_row.row * self._log_len + end - len(drafts), drafts)

    def send(self, *arrays: Ids) -> tuple[Tensor, ...]:
        """Bring the rows up to date; return arrays that go the same way. One copy, or none."""
        if not self._places:
            return send_all(arrays, self._device) if any(map(len, arrays)) else ()
        noted = (np.array(self._places), np.array(self._values))
        places, values, *others = send_all((*noted, *arrays), self._device)
        _put(self._flat, (places,), values)
        self._places.clear()
        self._values.clear()
        return tuple(others)

    def forget_notes(self) -> None:
        """Drop what was noted: the step that noted it has failed."""
        self._places.clear()
        self._values.clear()

    def append(self, samples: Samples, token_ids: Tensor) -> None:
        """Write sampled ids behind the positions that they were sampled from.

        With drafts, several positions of a row are written: up to the first that differs from
        its draft they are the drafts themselves, and what lies behind it is written again by a
        later step before anything reads it.
        """
        _put(self._logs, (samples.rows, samples.positions), token_ids)

    def gather(self, plan_rows: Sequence[PlanRow], row_tile: int) -> GatheredStep:
        """Put together the inputs of a step, padded to a multiple of `row_tile` tokens."""
        num_rows = len(plan_rows)
        rows = _array([each.row for each in plan_rows])
        starts = _array([each.start for each in plan_rows])
        counts = [each.num_tokens for each in plan_rows]
        query_starts = list(accumulate(counts, initial=0))
        num_tokens = query_starts[-1]
        is_decode = num_tokens == num_rows
        if is_decode:
            token_rows, positions = rows, starts
        else:
            spread = np.array(counts)
            token_rows = np.repeat(rows, spread)
            offsets = np.repeat(starts - query_starts[:-1], spread)
            positions = np.arange(num_tokens) + offsets
        padding = -num_tokens % row_tile
        if is_decode and all(each.sample for each in plan_rows):
            samples = (rows, starts + 1, NOTHING)
        else:
            samples = _sampled(plan_rows, query_starts)
        sent = self.send(rows, token_rows, positions, *samples)
        device_rows, device_token_rows, device_positions, *device_samples = sent
        num_blocks = max(self._states[each.row].num_blocks for each in plan_rows)
        token_ids, slots, tables = self._look_up(
            device_rows, device_token_rows, device_positions, num_blocks
        )
        inputs = StepInputs(
            token_ids=_padded(token_ids, padding),
            positions=_padded(device_positions, padding),
            slots=_padded(slots, padding, value=-1),
            block_tables=tables,
            query_starts=query_starts,
            seq_lens=[each.start + each.num_tokens for each in plan_rows],
        )
        return GatheredStep(inputs=inputs, samples=_samples(*device_samples))

    def _look_up(
        self, rows: Tensor, token_rows: Tensor, positions: Tensor, num_blocks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids and slots of a step's tokens, and the block tables of its rows, int64."""
        size = self._block_size
        blocks = _take(self._tables, token_rows, positions // size)
        token_ids = _take(self._logs, token_rows, positions)
        tables = _take(self._tables[:, :num_blocks], rows)
        return token_ids, blocks * size + positions % size, tables

    def _note(self, first: int, values: Iterable[int]) -> None:
        self._values.extend(values)
        self._places.extend(range(first, first + len(self._values) - len(self._places)))


def _reads_log(sampling: SamplingParams) -> bool:
    penalties = (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    has_long_words = any(len(word) > 1 for word in sampling.bad_words_token_ids)
    return penalties != (1.0, 0.0, 0.0) or has_long_words


def _sampled(plan_rows: Sequence[PlanRow], query_starts: list[int]) -> tuple[Ids, Ids, Ids]:
    """Return row, position and token of each place that samples."""
    rows: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    for index, plan_row in enumerate(plan_rows):
        if plan_row.sample:
            end = plan_row.start + plan_row.num_tokens
            last = query_starts[index + 1]
            for behind in range(len(plan_row.draft_token_ids), -1, -1):
                rows.append(plan_row.row)
                positions.append(end - behind)
                tokens.append(last - 1 - behind)
    return _array(rows), _array(positions), _array(tokens)


def _samples(rows: Tensor, positions: Tensor, tokens: Tensor) -> Samples | None:
    if not len(rows):
        return None
    return Samples(rows=rows, positions=positions, tokens=tokens if len(tokens) else None)


def _take(values: Array, *places: Tensor) -> Tensor:
    """Return what lies in some places, as int64."""
    if isinstance(values, Tensor):
        return values[places].to(torch.int64)
    return torch.from_numpy(values[tuple(each.numpy() for each in places)].astype(np.int64))


def _put(values: Array, places: tuple[Tensor, ...], numbers: Tensor) -> None:
    if isinstance(values, Tensor):
        values[places] = numbers.to(torch.int32)
    else:
        values[tuple(each.numpy() for each in places)] = numbers.numpy()


def _padded(values: Tensor, padding: int, value: int = 0) -> Tensor:
    return torch.nn.functional.pad(values, (0, padding), value=value) if padding else values


def _array(values: list[int]) -> Ids:
    return np.array(values, dtype=np.int64)
