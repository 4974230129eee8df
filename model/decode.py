"""Steps in which every sequence computes one token and samples the next: nearly all there are.

Such a step runs over static tensors, and what it is made of never depends on the host: only which
row each place of the batch is, and the position of its token, come from there. Token, block table
and slot are looked up on the device. When the step is done the positions are one further, so for
the same sequences the next step needs nothing from the host at all, unless one got a new block.

The batch is padded to one of a few sizes; a place without a sequence has position -1, writes to
no slot and attends to nothing. Who wants an id and nothing more gets it drawn from parameters
that lie on the device as well (model/sampling/residents.py); who wants more gets logits, and the
id from elsewhere. The same launches are made whether they are made one by one or replayed from a
graph, so a sequence's numbers do not change when its graph has been captured.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.graphs import DecodeGraphs, GraphRecorder, Part, decode_sizes
from model.network import Network, StepInputs
from model.operations import LookUp
from model.rows import NOTHING, Rows, Samples
from model.sampling.residents import ResidentDraws
from model.sampling.sampler import Sampled
from model.sampling.table import Draw
from model.step import PlanRow, RunnerLimits
from model.transfer import Ids

FORWARD: Part = "forward"


class DecodeBatch:
    """The static tensors of such steps, and the graphs over them.

    For networks that read lengths on the device alone (`StepInputs.device_seq_lens`). A step is
    `forward`, then `draw` or, for sequences that want more than an id, `logits`.
    """

    def __init__(
        self,
        network: Network,
        rows: Rows,
        look_up: LookUp,
        draws: ResidentDraws | None,
        limits: RunnerLimits,
        device: torch.device,
        recorder: GraphRecorder | None,
    ) -> None:
        self._network = network
        self._rows = rows
        self._look_up = look_up
        self._draws = draws
        self._block_size = limits.block_size
        sizes = decode_sizes(limits.max_num_seqs, network.row_tile)
        num_places = sizes[-1]
        self._row_of = torch.full((num_places,), rows.nobody, dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._row_of, -1)
        self._query_starts = torch.arange(num_places + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros((num_places, limits.vocab_size), device=device)
        self._token_ids = torch.zeros_like(self._row_of)
        self._is_broken = torch.zeros(num_places, dtype=torch.bool, device=device)
        # What rows and positions hold, as far as the host can tell.
        self._known_rows, self._known_positions = NOTHING, NOTHING
        self._size = 0  # of the step that runs
        self._graphs = DecodeGraphs(self._launch, self._clear, sizes, recorder)

    def warm_up(self) -> None:
        """Run the largest step with nobody in it, so that what is built at first use is built."""
        self._launch(FORWARD, len(self._row_of))
        if self._draws is not None:
            for most in Draw:
                self._launch(most, len(self._row_of))

    def forward(self, plan_rows: Sequence[PlanRow]) -> None:
        """Launch the forward pass of a step of such rows."""
        self._size = self._graphs.padded(len(plan_rows))
        rows = np.array([each.row for each in plan_rows], dtype=np.int64)
        positions = np.array([each.start for each in plan_rows], dtype=np.int64)
        self._place(rows, positions, self._size)
        self._known_rows = NOTHING  # unless this step succeeds
        self._graphs.run(FORWARD, self._size)
        self._known_rows, self._known_positions = rows, positions + 1

    def draw(self, num_rows: int, most: Draw) -> Sampled:
        """Draw ids for the rows of `forward`, append them to the logs, and return them.

        No row may ask for more than `most`. What is returned is good until the next step.
        """
        self._graphs.run(most, self._size)
        return Sampled(
            token_ids=self._token_ids[:num_rows],
            is_broken=self._is_broken[:num_rows],
            logprobs=None,
        )

    def logits(self, num_rows: int) -> tuple[Tensor, Samples]:
        """Return logits [N, V] of the rows of `forward`, and where their samples go.

        Both are good until the next step, and the logits are not to be modified.
        """
        samples = Samples(
            rows=self._row_of[:num_rows], positions=self._positions[:num_rows], tokens=None
        )
        return self._logits[:num_rows], samples

    def capture_next(self, num_rows: int, most: Draw | None) -> None:
        """Capture one more graph if it is time to; the arguments are what steps are now."""
        self._graphs.capture_next(num_rows, (FORWARD,) if most is None else (FORWARD, most))

    def capture_all(self) -> None:
        """Capture all graphs that are missing of what has been run, now."""
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

    def _launch(self, part: Part, size: int) -> None:
        """Launch one part of a step over the first `size` places. Host-independent."""
        if isinstance(part, Draw):
            self._launch_draw(part, size)
        else:
            self._launch_forward(size)

    def _launch_forward(self, size: int) -> None:
        """Compute the tokens of the places, and move on by one."""
        rows, tables = self._row_of[:size], self._rows.block_tables
        token_ids, at, slots, seq_lens = self._look_up(
            rows, self._positions[:size], self._rows.token_log, tables, self._block_size
        )
        inputs = StepInputs(
            token_ids=token_ids,
            positions=at,
            slots=slots,
            block_tables=tables.index_select(0, rows),
            query_starts=list(range(size + 1)),
            seq_lens=[1] * size,
            device_query_starts=self._query_starts[: size + 1],
            device_seq_lens=seq_lens,
        )
        self._network.compute_logits(self._network.forward(inputs), self._logits[:size])

    def _launch_draw(self, most: Draw, size: int) -> None:
        """Draw an id at the places' positions, which the forward pass has moved on."""
        assert self._draws is not None
        # Nobody's place writes to nobody's log.
        at = self._positions[:size].clamp(min=1)
        rows = self._row_of[:size]
        token_ids, is_broken = self._draws.draw(self._logits[:size], rows, at, most)
        self._token_ids[:size] = token_ids
        self._is_broken[:size] = is_broken
        self._rows.append(Samples(rows=rows, positions=at, tokens=None), token_ids)


def look_up(
    rows: Tensor, positions: Tensor, token_log: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up what the sequences in `rows` [S] compute at `positions` [S], and move those on by 1.

    Return token ids, positions from 0 on, slots, all [S] int64, and lengths [S] int32. Position -1
    stays, and has slot -1 and length 0. `token_log` [R, L] and `block_tables` [R, B] are int32.
    """
    is_taken = positions >= 0
    at = positions.clamp(min=0)
    blocks = block_tables[rows, at // block_size].to(torch.int64)
    slots = torch.where(is_taken, blocks * block_size + at % block_size, -1)
    token_ids = token_log[rows, at].to(torch.int64)
    seq_lens = (positions + 1).to(torch.int32)
    positions += is_taken
    return token_ids, at, slots, seq_lens


def is_decode(plan_rows: Sequence[PlanRow]) -> bool:
    """Whether a step is one of those: nobody has drafts, a chunk of a prompt, or scores to give."""
    return all(each.num_tokens == 1 and each.sample for each in plan_rows)
