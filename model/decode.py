"""Steps in which every sequence computes one token and samples the next: nearly all there are.

Such a step runs over static tensors, and what it is made of never depends on the host: only which
row each place of the batch is, and the position of its token, come from there. Token, block table
and slot are looked up on the device. When the step is done the positions are one further, so for
the same sequences the next step needs nothing from the host at all, unless one got a new block.

The batch is padded to one of a few sizes; a place without a sequence has position -1, writes to
no slot and attends to nothing. The same launches are made whether they are made one by one or
replayed from a graph, so a sequence's numbers do not change when its graph has been captured.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.graphs import DecodeGraphs, GraphRecorder, decode_sizes
from model.network import Network, StepInputs
from model.rows import NOTHING, Rows, Samples
from model.step import PlanRow, RunnerLimits
from model.transfer import Ids


class DecodeBatch:
    """The static tensors of such steps, and the graphs over them.

    For networks that read lengths on the device alone (`StepInputs.device_seq_lens`).
    """

    def __init__(
        self,
        network: Network,
        rows: Rows,
        limits: RunnerLimits,
        device: torch.device,
        recorder: GraphRecorder | None,
    ) -> None:
        self._network = network
        self._rows = rows
        self._block_size = limits.block_size
        sizes = decode_sizes(limits.max_num_seqs, network.row_tile)
        num_places = sizes[-1]
        self._row_of = torch.full((num_places,), rows.nobody, dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._row_of, -1)
        self._query_starts = torch.arange(num_places + 1, dtype=torch.int32, device=device)
        self._hidden: Tensor | None = None
        # What the two tensors hold, as far as the host can tell.
        self._known_rows, self._known_positions = NOTHING, NOTHING
        self._graphs = DecodeGraphs(self._run, self._clear, sizes, recorder)

    def warm_up(self) -> None:
        """Run the largest step with nobody in it, so that what is built at first use is built."""
        self._run(len(self._row_of))

    def run(self, plan_rows: Sequence[PlanRow]) -> tuple[Tensor, Samples]:
        """Launch a step of such rows; return hidden states [padded size, hidden] and its samples.

        The states are good until the next step, the samples until then as well.
        """
        num_rows = len(plan_rows)
        size = self._graphs.padded(num_rows)
        rows = np.array([each.row for each in plan_rows], dtype=np.int64)
        positions = np.array([each.start for each in plan_rows], dtype=np.int64)
        self._place(rows, positions, size)
        self._known_rows = NOTHING  # unless this step succeeds
        self._graphs.run(size)
        self._known_rows, self._known_positions = rows, positions + 1
        assert self._hidden is not None
        samples = Samples(
            rows=self._row_of[:num_rows], positions=self._positions[:num_rows], tokens=None
        )
        return self._hidden[:size], samples

    def capture_next(self, num_rows: int) -> None:
        """Capture one more graph if it is time to; `num_rows` is what steps are made of now."""
        self._graphs.capture_next(num_rows)

    def capture_all(self) -> None:
        """Capture all graphs that are missing, now."""
        self._graphs.capture_all()

    @property
    def num_captured(self) -> int:
        return self._graphs.num_captured

    def _place(self, rows: Ids, positions: Ids, size: int) -> None:
        """Have the sequences in their places, at their positions; send only what is new."""
        is_known = np.array_equal(rows, self._known_rows)
        if is_known and np.array_equal(positions, self._known_positions):
            self._rows.send()
            return
        empty = size - len(rows)
        padded_rows = np.pad(rows, (0, empty), constant_values=self._rows.nobody)
        padded_positions = np.pad(positions, (0, empty), constant_values=-1)
        row_of, at = self._rows.send(padded_rows, padded_positions)
        self._row_of[:size] = row_of
        self._positions[:size] = at

    def _clear(self) -> None:
        """Take everybody out: a step may then run at any time, and changes nothing."""
        self._known_rows = NOTHING
        self._row_of.fill_(self._rows.nobody)
        self._positions.fill_(-1)

    def _run(self, size: int) -> None:
        """Compute the tokens of the first `size` places, and move on by one. Host-independent."""
        rows, positions = self._row_of[:size], self._positions[:size]
        is_taken = positions >= 0
        at = positions.clamp(min=0)
        tables = self._rows.block_tables.index_select(0, rows)
        blocks = tables.gather(1, (at // self._block_size)[:, None])[:, 0].to(torch.int64)
        slots = blocks * self._block_size + at % self._block_size
        inputs = StepInputs(
            token_ids=self._rows.token_log[rows, at].to(torch.int64),
            positions=at,
            slots=torch.where(is_taken, slots, -1),
            block_tables=tables,
            query_starts=list(range(size + 1)),
            seq_lens=[1] * size,
            device_query_starts=self._query_starts[: size + 1],
            device_seq_lens=(positions + 1).to(torch.int32),
        )
        hidden = self._network.forward(inputs)
        if self._hidden is None:
            self._hidden = hidden.new_empty(len(self._row_of), hidden.shape[1])
        self._hidden[:size] = hidden
        positions += is_taken


def is_decode(plan_rows: Sequence[PlanRow]) -> bool:
    """Whether a step is one of those: nobody has drafts, a chunk of a prompt, or scores to give."""
    return all(each.num_tokens == 1 and each.sample for each in plan_rows)
