"""One permanent row a sequence: its token log and block table, on the device.

A step's inputs are gathered from rows, and a sampled id is appended to its row's log without a
detour over the host, so that the next step can be launched before anybody has read it.
"""

from dataclasses import dataclass

import torch

from model.network import StepInputs
from model.step import NewRow, PlanRow, RunnerLimits, SamplingParams
from model.transfer import send, upload


@dataclass(slots=True)
class RowState:
    """What the host knows of a resident sequence."""

    sampling: SamplingParams
    num_prompt_tokens: int
    num_blocks: int = 0


class Rows:
    """All rows of a runner, and the gathering of a step's inputs from them."""

    def __init__(self, limits: RunnerLimits, device: torch.device) -> None:
        self._device = device
        self._block_size = limits.block_size
        max_blocks = -(-limits.max_model_len // limits.block_size)
        num_rows = limits.max_num_seqs
        # int32: with a context of 128k and 256 rows, the log alone is 134 MB.
        log_shape = (num_rows, limits.max_model_len + 1)
        self.token_log = torch.zeros(log_shape, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros((num_rows, max_blocks), dtype=torch.int32, device=device)
        self._states: dict[int, RowState] = {}

    def __getitem__(self, row: int) -> RowState:
        return self._states[row]

    def remove(self, row: int) -> None:
        """Forget a sequence; its row may hold nothing."""
        self._states.pop(row, None)

    def add(self, new: NewRow) -> None:
        assert new.row not in self._states
        self._states[new.row] = RowState(new.sampling, new.num_prompt_tokens)
        token_ids = upload(new.token_ids, torch.int32, self._device)
        self.token_log[new.row, : len(token_ids)] = token_ids

    def extend(self, plan_row: PlanRow) -> None:
        """Append the plan's new blocks to the row's table, and its drafts to the log."""
        state = self._states[plan_row.row]
        assert plan_row.num_tokens > len(plan_row.draft_token_ids)
        if plan_row.new_block_ids:
            blocks = upload(plan_row.new_block_ids, torch.int32, self._device)
            end = state.num_blocks + len(blocks)
            self._block_tables[plan_row.row, state.num_blocks : end] = blocks
            state.num_blocks = end
        assert plan_row.start + plan_row.num_tokens <= state.num_blocks * self._block_size
        if plan_row.draft_token_ids:
            end = plan_row.start + plan_row.num_tokens
            drafts = upload(plan_row.draft_token_ids, torch.int32, self._device)
            self.token_log[plan_row.row, end - len(drafts) : end] = drafts

    def gather(self, plan_rows: tuple[PlanRow, ...], row_tile: int) -> StepInputs:
        """Put together the inputs of a step, padded to a multiple of `row_tile` tokens."""
        counts = [row.num_tokens for row in plan_rows]
        num_tokens = sum(counts)
        rows = torch.tensor([row.row for row in plan_rows])
        token_rows = rows.repeat_interleave(torch.tensor(counts))
        positions = torch.cat(
            [torch.arange(row.start, row.start + row.num_tokens) for row in plan_rows]
        )
        rows, token_rows, positions = (
            send(each, self._device) for each in (rows, token_rows, positions)
        )
        blocks = self._block_tables[token_rows, positions // self._block_size].to(torch.int64)
        slots = blocks * self._block_size + positions % self._block_size
        token_ids = self.token_log[token_rows, positions].to(torch.int64)
        padding = -num_tokens % row_tile
        query_starts = [0]
        for count in counts:
            query_starts.append(query_starts[-1] + count)
        max_blocks = max(self._states[row.row].num_blocks for row in plan_rows)
        return StepInputs(
            token_ids=torch.nn.functional.pad(token_ids, (0, padding)),
            positions=torch.nn.functional.pad(positions, (0, padding)),
            slots=torch.nn.functional.pad(slots, (0, padding), value=-1),
            block_tables=self._block_tables[rows, :max_blocks].to(torch.int64),
            query_starts=query_starts,
            seq_lens=[row.start + row.num_tokens for row in plan_rows],
        )
