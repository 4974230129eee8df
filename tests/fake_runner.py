"""A runner without tensors that notices every mistake a scheduler can make.

It keeps, for every slot of the pool, a digest of the tokens whose K/V would be there, and
"attends" by comparing those digests with the row's own log. A block that was evicted too early,
shared for writing, hit under a wrong key or never computed shows up as an AssertionError. The
"model" is a hash: the next token depends on all tokens before, on the seed and on the position,
so that a right continuation can be told from any wrong one. With an odd seed it repeats itself
for some tokens at a time, so that guesses are right now and then.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from model.step import (
    FillMasks,
    NewRow,
    PlanRow,
    RowResult,
    RunnerLimits,
    SamplingParams,
    StepHandle,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

Digest = bytes
START: Digest = b"start"


def _extend(digest: Digest, token_id: int) -> Digest:
    return blake2b(digest + token_id.to_bytes(4, "little"), digest_size=8).digest()


def _sample(digest: Digest, sampling: SamplingParams, position: int, vocab_size: int) -> int:
    if sampling.seed % 2 and position % 7:
        return position % 7 % 3 % vocab_size
    key = f"{sampling.seed}/{sampling.choice}/{position}/{sampling.is_greedy}".encode()
    return int.from_bytes(blake2b(digest + key, digest_size=8).digest(), "little") % vocab_size


def expected_tokens(prompt: list[int], sampling: SamplingParams, vocab_size: int) -> list[int]:
    """What a sequence must yield, whatever its company: the definition, with no engine."""
    digest = START
    for token_id in prompt:
        digest = _extend(digest, token_id)
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        token_id = _sample(digest, sampling, len(prompt) + len(output), vocab_size)
        output.append(token_id)
        if token_id in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            break
        digest = _extend(digest, token_id)
    return output


@dataclass(slots=True)
class _Row:
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_table: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Handle(StepHandle):
    masks: list[bytes] = field(default_factory=list)


class FakeRunner:
    """Runner whose steps complete in order; with `max_inflight` > 1 results come only later.

    `on_launch` is called with each plan first; it may raise, to stand for a device that fails.
    `row_error` names rows whose logits went wrong in a plan.
    """

    def __init__(
        self,
        limits: RunnerLimits,
        on_launch: Callable[[StepPlan], None] | None = None,
        row_error: Callable[[StepPlan, PlanRow], str | None] | None = None,
    ) -> None:
        self.limits = limits
        self.plans: list[StepPlan] = []
        self._on_launch = on_launch
        self._row_error = row_error
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, Digest] = {}
        self._inflight: list[_Handle] = []

    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        assert len(self._inflight) < self.limits.max_inflight
        assert plan.rows
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        self.plans.append(plan)
        if self._on_launch is not None:
            try:
                self._on_launch(plan)
            except Exception:
                self.abandon()
                raise
        for row in plan.removed:
            self._rows.pop(row, None)
        for added in plan.added:
            self._add(added)
        handle = _Handle(plan=plan)
        self._write(plan)
        num_words = -(-self.limits.vocab_size // 32)
        buffers = [bytearray(b"\xff" * 4 * num_words) for _ in range(plan.num_mask_slots)]
        fill_masks([memoryview(buffer) for buffer in buffers])
        handle.masks = [bytes(buffer) for buffer in buffers]
        handle.result = StepResult(
            step_id=plan.step_id, rows=tuple(self._compute(plan, row) for row in plan.rows)
        )
        self._inflight.append(handle)
        return handle

    def collect(self, handle: StepHandle) -> StepResult:
        assert handle is self._inflight[0], "steps are collected in order"
        self._inflight.pop(0)
        assert handle.result is not None
        return handle.result

    def abandon(self) -> None:
        """Lose the steps in flight, as a device that fails does."""
        self._inflight.clear()

    def _add(self, added: NewRow) -> None:
        assert 0 <= added.row < self.limits.max_num_seqs
        assert added.row not in self._rows, "a row is added twice"
        self._rows[added.row] = _Row(list(added.token_ids), added.num_prompt_tokens, added.sampling)

    def _write(self, plan: StepPlan) -> None:
        """Put the digests of all the step's tokens into their slots, before anybody reads."""
        written: set[int] = set()
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        for plan_row in plan.rows:
            row = self._rows[plan_row.row]
            row.block_table.extend(plan_row.new_block_ids)
            row.token_ids.extend(plan_row.draft_token_ids)
            end = plan_row.start + plan_row.num_tokens
            assert plan_row.num_tokens > 0
            assert end <= len(row.token_ids), "a token is computed before it is sampled"
            assert end <= len(row.block_table) * self.limits.block_size
            assert end <= self.limits.max_model_len
            digest = START
            for position in range(end):
                digest = _extend(digest, row.token_ids[position])
                if position >= plan_row.start:
                    slot = self._slot(row, position)
                    assert slot not in written, "two rows write one slot"
                    written.add(slot)
                    self._slots[slot] = digest

    def _slot(self, row: _Row, position: int) -> int:
        size = self.limits.block_size
        return row.block_table[position // size] * size + position % size

    def _verify(self, row: _Row, plan_row: PlanRow) -> tuple[int, ...]:
        """Sample behind each draft as long as the drafts are right; forget those that are not."""
        num_known = len(row.token_ids) - len(plan_row.draft_token_ids)
        drafts, row.token_ids = row.token_ids[num_known:], row.token_ids[:num_known]
        digest = START
        for token_id in row.token_ids:
            digest = _extend(digest, token_id)
        sampled = []
        for draft in [*drafts, None]:
            position = len(row.token_ids)
            token_id = _sample(digest, row.sampling, position, self.limits.vocab_size)
            sampled.append(token_id)
            row.token_ids.append(token_id)
            if token_id != draft:
                break
            digest = _extend(digest, token_id)
        return tuple(sampled)

    def _compute(self, plan: StepPlan, plan_row: PlanRow) -> RowResult:
        """Attend over all positions, then sample if asked to."""
        row = self._rows[plan_row.row]
        end = plan_row.start + plan_row.num_tokens
        digest = START
        prompt_logprobs = []
        for position in range(end):
            digest = _extend(digest, row.token_ids[position])
            assert self._slots.get(self._slot(row, position)) == digest, "wrong K/V is read"
            if plan_row.logits_from <= position < row.num_prompt_tokens - 1:
                token_id = row.token_ids[position + 1]
                prompt_logprobs.append(TokenLogprobs(token_id=token_id, logprob=-1.0, rank=1))
        if self._row_error and (error := self._row_error(plan, plan_row)):
            return RowResult(row=plan_row.row, error=error)
        token_ids: tuple[int, ...] = ()
        if plan_row.sample:
            assert end == len(row.token_ids)
            assert plan_row.logits_from <= end - 1 - len(plan_row.draft_token_ids)
            token_ids = self._verify(row, plan_row)
        else:
            assert not plan_row.draft_token_ids
        return RowResult(
            row=plan_row.row,
            token_ids=token_ids,
            prompt_logprobs=tuple(prompt_logprobs),
        )
