"""Which tokens of which sequences the next step computes, and what its result means.

There is no prefill phase and no decode phase. Every sequence has tokens (`num_tokens`: known
or in flight) and K/V for the first `num_computed_tokens` of them; each step hands out a budget
of tokens so that the sequences catch up. A prompt cut into chunks, a prefix found in the cache,
a preempted sequence that starts over and a sequence that is one token behind because it just
sampled one are all the same case.

Nothing here waits for a sampled value: `schedule` may be called again before `update` has seen
the last result. Knows no threads, tensors or text.
"""

import logging
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from app.engine.blocks import Block, BlockAllocator, BlockHasher
from app.engine.client import EngineRequest, FinishReason, SequenceOutput
from app.engine.drafts import Drafter, NgramSpeculation
from app.engine.fairness import FairShares
from app.engine.measures import EngineMeasures
from app.engine.planning import OpenStep, ScheduledStep
from app.engine.queue import WaitingQueue
from app.engine.request import Request, Sequence, make_request
from app.engine.suspects import Suspects
from model.step import (
    ConstraintFailed,
    NewRow,
    PlanRow,
    RowResult,
    RunnerLimits,
    StepPlan,
    StepResult,
)

logger = logging.getLogger(__name__)

FREE_STEP_TOKENS = 16  # up to here a step costs little more than one of a single token


@dataclass(slots=True)
class Update:
    """An output, and the sequence that it belongs to."""

    sequence: Sequence
    output: SequenceOutput


@dataclass(slots=True)
class SchedulerCounters:
    """What has happened so far; numbers only grow."""

    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_failed_steps: int = 0
    num_isolated: int = 0  # sequences that ended for a step or a row that went wrong
    num_drafts: int = 0  # times that a sequence guessed ahead
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    measures: EngineMeasures = field(default_factory=EngineMeasures)


class Scheduler:
    """Owns the queue, the running sequences and the blocks. Used by the worker thread alone."""

    def __init__(
        self,
        limits: RunnerLimits,
        *,
        enable_prefix_caching: bool = True,
        speculation: NgramSpeculation | None = None,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        assert limits.max_num_batched_tokens >= limits.max_num_seqs
        self.limits = limits
        self.allocator = BlockAllocator(limits.num_blocks, limits.block_size)
        self._tenant_weights = tenant_weights or {}
        self.shares = FairShares(self._tenant_weights)
        self.waiting = WaitingQueue(self.shares)
        self.running: list[Sequence] = []  # by `Sequence.order`: the last is preempted first
        self.counters = SchedulerCounters()
        self._enable_prefix_caching = enable_prefix_caching
        # With a step in flight the last token is unknown, and so is what might follow it.
        self._speculation = speculation if limits.max_inflight == 1 else None
        self._hasher = BlockHasher()
        self._free_rows = list(reversed(range(limits.max_num_seqs)))
        self._removed_rows: list[int] = []
        self._suspects = Suspects()
        self._num_requests = 0

    # Requests come and go

    def add(self, message: EngineRequest) -> Request:
        """Queue a request whose tokens, all its output included, fit the pool."""
        root_key = self._hasher.root(None, message.cache_salt)
        request = make_request(message, self._num_requests, root_key)
        self._num_requests += 1
        for sequence in request.sequences:
            self.shares.arrive(request.tenant)
            self.waiting.push(sequence)
            request.timeline.note("queued", sequence.index)
        return request

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence wherever it is; its blocks are free at once."""
        assert sequence.finish_reason is None
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._leave_row(sequence)
        sequence.finish_reason = reason
        sequence.request.timeline.note("done", sequence.index, reason=reason)
        self.shares.leave(sequence.request.tenant)

    def count_cached(self, token_ids: tuple[int, ...], cache_salt: str) -> int:
        """Return how many tokens of a prompt would come from the prefix cache just now."""
        if not self._enable_prefix_caching:
            return 0
        size = self.limits.block_size
        parent = self._hasher.root(None, cache_salt)
        for start in range(0, len(token_ids) - size, size):
            block_ids = tuple(token_ids[start : start + size])
            key = self._hasher.key(parent, block_ids)
            if self.allocator.lookup(key, parent, block_ids) is None:
                return start
            parent = key
        return (len(token_ids) - 1) // size * size

    # Planning

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step; None when no sequence can be advanced."""
        if self.shares.is_contended:
            self._make_way()
        num_decoding = sum(sequence.num_behind == 1 for sequence in self.running)
        step = OpenStep(self.limits.max_num_batched_tokens - num_decoding)
        trial = self._suspects.next_trial()
        if trial:
            self._schedule_trial(step, trial)
        elif not self._schedule_running(step, self.running):
            self._schedule_waiting(step)
        if not step.rows:
            return None
        self._add_drafts(step)
        constrained, num_mask_slots = step.give_mask_slots()
        plan = StepPlan(
            step_id=self.counters.num_steps,
            removed=tuple(self._removed_rows),
            added=tuple(step.added),
            rows=tuple(step.rows),
            num_mask_slots=num_mask_slots,
        )
        self._removed_rows.clear()
        self.counters.num_steps += 1
        num_tokens = plan.num_tokens
        self.counters.num_scheduled_tokens += num_tokens
        self.counters.measures.step_tokens.observe(num_tokens)
        self.counters.measures.step_seqs.observe(len(plan.rows))
        self._count_served(step, num_tokens)
        return ScheduledStep(
            plan=plan,
            sequences=step.sequences,
            epochs=[sequence.epoch for sequence in step.sequences],
            constrained=constrained,
        )

    def _count_served(self, step: OpenStep, num_tokens: int) -> None:
        """Charge a step to those whose tokens it computes."""
        if num_tokens == len(step.rows) == len(self.running):
            self.shares.serve_each_row()
            return
        for row, sequence in zip(step.rows, step.sequences, strict=True):
            self.shares.serve(sequence.request.tenant, row.num_tokens)

    def _schedule_trial(self, step: OpenStep, trial: list[Sequence]) -> None:
        """Advance some of those that were in a step that failed, and nobody else.

        They ran together before, so there is room for them once the others have made it.
        """
        self._schedule_running(step, [sequence for sequence in trial if sequence.row is not None])
        for sequence in trial:
            if sequence.row is not None or not step.budget:
                continue
            needed = self._num_blocks_missing(sequence)
            while not self._free_rows or self.allocator.num_free < needed:
                others = [other for other in self.running if other not in trial]
                if not others:
                    return
                self._preempt(others[-1])
            self._admit(step, sequence, [])

    def _schedule_running(self, step: OpenStep, sequences: list[Sequence]) -> bool:
        """Advance who already has a row, in order; True if somebody had to give way.

        A sequence one token behind has its token set aside before anyone's longer share is
        cut: a long prompt never holds up the sequences that stream.
        """
        num_preemptions = self.counters.num_preemptions
        sequences = list(sequences)
        reserved = 0
        if self.shares.is_contended and self._is_scarce(step):
            counters = self.shares.counters
            sequences.sort(key=lambda s: counters[s.request.tenant])  # else in order
            reserved = self._reserve(step.budget)
        for sequence in sequences:
            num_behind = sequence.num_behind
            if sequence.row is None or not num_behind:
                continue
            if num_behind == 1:
                if self._make_room(step, sequence, 1):
                    self._plan(step, sequence, 1)
                continue
            self._extend_from_cache(sequence)
            num_tokens = self._share(sequence, max(0, step.budget - reserved))
            if num_tokens and self._make_room(step, sequence, num_tokens):
                step.budget -= num_tokens
                self._plan(step, sequence, num_tokens)
        return self.counters.num_preemptions > num_preemptions

    def _is_scarce(self, step: OpenStep) -> bool:
        """Whether it matters who comes first: not where all need one token and find a block."""
        num_running = len(self.running)
        num_decoding = self.limits.max_num_batched_tokens - step.budget
        return num_decoding < num_running or self.allocator.num_free < num_running

    def _make_way(self) -> None:
        """Preempt who has more than its share of rows for a tenant that has less and waits."""
        num_rows = self.limits.max_num_seqs
        if not self.waiting or self._suspects.next_trial():
            return
        head = self.waiting.peek()
        tenant = head.request.tenant
        if self.shares.rows.get(tenant, 0) >= self.shares.rows_due(tenant, num_rows):
            return
        while not (self._free_rows and self._fits(head)):
            over = self.shares.most_over(num_rows)
            if over is None or over == tenant:
                return
            self._preempt(next(s for s in reversed(self.running) if s.request.tenant == over))

    def _fits(self, sequence: Sequence) -> bool:
        promised = sum(self._num_blocks_missing(running) for running in self.running)
        return self.allocator.num_free - promised >= self._num_blocks_missing(sequence)

    def _reserve(self, budget: int) -> int:
        """Return what long prompts that run leave of a step to the tenant that waits, by weight."""
        if not self.waiting or not self._free_rows:
            return 0
        head = self.waiting.peek()
        return min(head.num_behind, self.shares.rows_due(head.request.tenant, budget))

    def _schedule_waiting(self, step: OpenStep) -> None:
        """Admit who waits, in order, as long as rows, budget and blocks for all its tokens last."""
        if not self.waiting:
            return
        promised = sum(self._num_blocks_missing(sequence) for sequence in self.running)
        while self.waiting and self._free_rows and step.budget:
            sequence = self.waiting.peek()
            hits = self._find_prefix(sequence)
            num_free = self.allocator.num_free - sum(block.ref_count == 0 for block in hits)
            if num_free - promised < self._num_blocks_missing(sequence) - len(hits):
                break
            self._admit(step, sequence, hits)
            promised += self._num_blocks_missing(sequence)

    def _admit(self, step: OpenStep, sequence: Sequence, hits: list[Block]) -> None:
        """Give a waiting sequence a row and its share of the step."""
        self.waiting.remove(sequence)
        self._enter_row(step, sequence, hits)
        num_tokens = self._share(sequence, step.budget)
        self._grow(sequence, num_tokens)
        step.budget -= num_tokens
        self._plan(step, sequence, num_tokens)

    def _share(self, sequence: Sequence, budget: int) -> int:
        """Tokens a sequence may compute; a chunk that is not its last ends with a full block."""
        if sequence.num_behind <= budget:
            return sequence.num_behind
        end = sequence.num_computed_tokens + budget
        aligned = end - end % self.limits.block_size - sequence.num_computed_tokens
        return aligned if aligned > 0 else budget

    def _plan(self, step: OpenStep, sequence: Sequence, num_tokens: int) -> None:
        """Write a sequence's row of the plan and count its tokens as computed."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        sample = end == sequence.num_tokens and sequence.sampling.max_tokens > 0
        logits_from = end - 1 if sample else end
        if sequence.sampling.prompt_logprobs is not None and start < sequence.num_prompt_tokens - 1:
            logits_from = min(logits_from, max(start, sequence.num_prompt_logprobs))
        new_blocks = sequence.blocks[sequence.num_sent_blocks :]
        sequence.num_sent_blocks = len(sequence.blocks)
        assert sequence.row is not None
        step.sequences.append(sequence)
        step.rows.append(
            PlanRow(
                row=sequence.row,
                start=start,
                num_tokens=num_tokens,
                new_block_ids=tuple(block.block_id for block in new_blocks),
                logits_from=logits_from,
                sample=sample,
            )
        )
        if num_tokens > 1 or start < sequence.num_prompt_tokens:
            sequence.request.timeline.note("prefill", sequence.index, num_tokens)
        sequence.num_computed_tokens = end
        sequence.num_inflight_tokens += sample
        self._register_full_blocks(sequence)

    def _add_drafts(self, step: OpenStep) -> None:
        """Let the sequences that decode go ahead, with what all others have left of a step.

        First with what their constraints force on them, which is hardly ever wrong, then with
        guesses. A small step is mostly spent on reading the weights, however many tokens it has:
        guesses share what is left of `FREE_STEP_TOKENS`, evenly, so they get shorter with company
        and end where computing counts.
        """
        may_grow: bool | None = None  # looked up if anybody has drafts
        guessing: list[int] = []
        for place, (row, sequence) in enumerate(zip(step.rows, step.sequences, strict=True)):
            if not row.sample or row.num_tokens > 1:
                continue
            if sequence.constraint is None and self._speculation is None:
                continue
            forced = sequence.constraint.forced() if sequence.constraint else ()
            if not forced:
                guessing.append(place)
                continue
            may_grow = self._has_blocks_to_the_end() if may_grow is None else may_grow
            drafts = tuple(forced[: self._room(sequence, step.budget, may_grow)])
            step.budget -= len(drafts)
            step.rows[place] = self._with_drafts(sequence, row, drafts)
        num_tokens = sum(row.num_tokens for row in step.rows)
        room = min(step.budget, FREE_STEP_TOKENS - num_tokens)
        if self._speculation is None or not guessing or room < len(guessing):
            return
        may_grow = self._has_blocks_to_the_end() if may_grow is None else may_grow
        for place in guessing:
            sequence = step.sequences[place]
            limit = self._room(sequence, room // len(guessing), may_grow)
            drafts = self._guess(sequence, self._speculation, limit)
            sequence.num_guessed = len(drafts)
            self.counters.num_drafts += bool(drafts)
            self.counters.num_draft_tokens += len(drafts)
            step.rows[place] = self._with_drafts(sequence, step.rows[place], drafts)

    def _room(self, sequence: Sequence, limit: int, may_grow: bool) -> int:
        """Return how many drafts a sequence may have, at most `limit`."""
        limit = min(limit, sequence.sampling.max_tokens - sequence.num_output_tokens)
        if not may_grow:
            num_slots = len(sequence.blocks) * self.limits.block_size
            limit = min(limit, num_slots - sequence.num_computed_tokens)
        return max(0, limit)

    def _guess(
        self, sequence: Sequence, speculation: NgramSpeculation, limit: int
    ) -> tuple[int, ...]:
        if not limit:
            return ()
        if sequence.drafter is None:
            capacity = sequence.num_prompt_tokens + sequence.sampling.max_tokens
            sequence.drafter = Drafter(speculation, capacity)
        drafts = sequence.drafter.propose(sequence.token_ids, limit)
        if drafts and sequence.constraint is not None:
            drafts = drafts[: sequence.constraint.num_allowed(drafts)]
        return drafts

    def _with_drafts(self, sequence: Sequence, row: PlanRow, drafts: tuple[int, ...]) -> PlanRow:
        """Return a decoding sequence's row with drafts behind its token.

        They do not count as computed: that is for the result to say, and what was wrong is
        written over by the next step.
        """
        if not drafts:
            return row
        self._grow(sequence, len(drafts))
        new_blocks = sequence.blocks[sequence.num_sent_blocks :]
        sequence.num_sent_blocks = len(sequence.blocks)
        return replace(
            row,
            num_tokens=1 + len(drafts),
            new_block_ids=(*row.new_block_ids, *(block.block_id for block in new_blocks)),
            draft_token_ids=drafts,
        )

    def _has_blocks_to_the_end(self) -> bool:
        """Whether all that run can get their last token, and nobody waits for a block.

        Then a block taken for a guess is one taken a few tokens early, from nobody. Otherwise
        guesses end with the blocks that a sequence has anyway.
        """
        ends = (s.num_prompt_tokens + s.sampling.max_tokens for s in self.running)
        missing = (
            max(0, self._num_blocks(end) - len(sequence.blocks))
            for sequence, end in zip(self.running, ends, strict=True)
        )
        return not self.waiting and sum(missing) <= self.allocator.num_free

    # Rows and blocks

    def _enter_row(self, step: OpenStep, sequence: Sequence, hits: list[Block]) -> None:
        sequence.row = self._free_rows.pop()
        self.shares.take_row(sequence.request.tenant)
        insort(self.running, sequence, key=lambda running: running.order)
        step.added.append(
            NewRow(
                row=sequence.row,
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=sequence.sampling,
            )
        )
        if sequence.request.read_prefix_cache and self._enable_prefix_caching:
            self.counters.prefix_cache_queries += len(sequence.token_ids)
        self._take_hits(sequence, hits)
        num_cached = sequence.num_computed_tokens
        sequence.request.timeline.note("admitted", sequence.index, num_cached)

    def _leave_row(self, sequence: Sequence) -> None:
        """Give back row and blocks; results of steps in flight will not count."""
        assert sequence.row is not None
        place = bisect_left(self.running, sequence.order, key=lambda running: running.order)
        assert self.running[place] is sequence
        del self.running[place]
        self._free_rows.append(sequence.row)
        self._removed_rows.append(sequence.row)
        self.shares.give_row_back(sequence.request.tenant)
        self.allocator.release(sequence.blocks)
        sequence.leave_row()

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it will compute its tokens again, less what is still cached.

        A token in flight is dropped and sampled again: randomness depends on its position
        alone, so it comes out the same.
        """
        self._leave_row(sequence)
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1
        sequence.request.timeline.note("preempted", sequence.index)
        self.waiting.push(sequence)

    def _make_room(self, step: OpenStep, sequence: Sequence, num_tokens: int) -> bool:
        """Get blocks for more tokens, from the last in order if need be; False if that is itself.

        Who is planned already is left alone.
        """
        end = sequence.num_computed_tokens + num_tokens
        if end <= len(sequence.blocks) * self.limits.block_size:
            return True
        while self.allocator.num_free < self._num_blocks(end) - len(sequence.blocks):
            victim = next(s for s in reversed(self.running) if s not in step.sequences)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._grow(sequence, num_tokens)
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        end = sequence.num_computed_tokens + num_tokens
        missing = self._num_blocks(end) - len(sequence.blocks)
        sequence.blocks.extend(self.allocator.allocate(missing))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)

    def _num_blocks_missing(self, sequence: Sequence) -> int:
        """Blocks that a sequence lacks for all its tokens and the next one."""
        return max(0, self._num_blocks(sequence.num_tokens + 1) - len(sequence.blocks))

    # The prefix cache

    def _find_prefix(self, sequence: Sequence) -> list[Block]:
        """Cached blocks that continue what is computed, as far as they go.

        The last token is never taken from the cache: its logits are wanted.
        """
        can_read = self._enable_prefix_caching and sequence.request.read_prefix_cache
        size = self.limits.block_size
        first, remainder = divmod(sequence.num_computed_tokens, size)
        hits: list[Block] = []
        if not can_read or remainder or len(sequence.blocks) > first:
            return hits
        for index in range(first, (len(sequence.token_ids) - 1) // size):
            self._extend_keys(sequence, index + 1)
            parent = sequence.block_keys[index - 1] if index else sequence.request.root_key
            token_ids = tuple(sequence.token_ids[index * size : (index + 1) * size])
            block = self.allocator.lookup(sequence.block_keys[index], parent, token_ids)
            if block is None:
                break
            hits.append(block)
        return hits

    def _take_hits(self, sequence: Sequence, hits: list[Block]) -> None:
        for block in hits:
            self.allocator.share(block)
        sequence.blocks.extend(hits)
        num_tokens = len(hits) * self.limits.block_size
        sequence.num_computed_tokens += num_tokens
        sequence.num_registered_blocks += len(hits)
        self.counters.prefix_cache_hits += num_tokens
        if not sequence.num_preemptions:
            sequence.num_cached_tokens += num_tokens

    def _extend_from_cache(self, sequence: Sequence) -> None:
        """Skip what another sequence has computed meanwhile.

        Several prompts with one beginning, sent at once, so compute it once between them.
        """
        if sequence.num_behind > self.limits.block_size:
            self._take_hits(sequence, self._find_prefix(sequence))

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        size = self.limits.block_size
        for index in range(len(sequence.block_keys), count):
            parent = sequence.block_keys[-1] if index else sequence.request.root_key
            token_ids = sequence.token_ids[index * size : (index + 1) * size]
            sequence.block_keys.append(self._hasher.key(parent, token_ids))

    def _register_full_blocks(self, sequence: Sequence) -> None:
        """Make findable every block that is full of computed tokens whose ids are known.

        This happens as soon as the step that computes them is planned: steps run in order, and
        within a step K/V is written before it is read.
        """
        if not self._enable_prefix_caching:
            return
        size = self.limits.block_size
        num_full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // size
        if num_full <= sequence.num_registered_blocks:
            return
        self._extend_keys(sequence, num_full)
        for index in range(sequence.num_registered_blocks, num_full):
            key = sequence.block_keys[index]
            parent = sequence.block_keys[index - 1] if index else sequence.request.root_key
            token_ids = tuple(sequence.token_ids[index * size : (index + 1) * size])
            self.allocator.register(sequence.blocks[index], key, parent, token_ids)
        sequence.num_registered_blocks = num_full

    # Results

    def update(self, step: ScheduledStep, result: StepResult) -> list[Update]:
        """Take in a step's result; drop what belongs to sequences that have left since."""
        updates = []
        planned = zip(step.sequences, step.epochs, step.plan.rows, result.rows, strict=True)
        for sequence, epoch, plan_row, row in planned:
            if sequence.epoch != epoch:
                continue
            output = refusal = error = None
            try:
                refusal = step.broken.get(sequence)
                error = row.error if refusal is None else None
                if refusal is None and error is None:
                    output = self._take_result(sequence, plan_row, row)
            except ConstraintFailed as failure:
                refusal = str(failure)
            except Exception:  # a fault of ours in one sequence's result costs no other's
                logger.exception("a result could not be taken in")
                error = "the result of this request could not be taken in"
            if refusal is not None:
                updates.append(self._fail_row(sequence, refusal, is_refused=True))
            elif error is not None:
                self.counters.num_isolated += 1
                updates.append(self._fail_row(sequence, error, is_refused=False))
            elif output is not None:
                updates.append(Update(sequence, output))
        return updates

    def _take_result(
        self, sequence: Sequence, plan_row: PlanRow, row: RowResult
    ) -> SequenceOutput | None:
        """Append the sampled tokens and end the sequence if it has enough of them."""
        sampling = sequence.sampling
        reason: FinishReason | None = None
        stop_token_id = None
        accepted = 0
        if row.token_ids and len(sequence.token_ids) == sequence.num_prompt_tokens:
            sequence.request.timeline.note("first_token", sequence.index)
        for token_id in row.token_ids:
            accepted += 1
            sequence.token_ids.append(token_id)
            num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
            if token_id in sampling.stop_token_ids and num_output >= sampling.min_tokens:
                reason, stop_token_id = "stop", token_id
            elif num_output >= sampling.max_tokens:
                reason = "length"
            if reason:
                break
        if row.token_ids:
            sequence.is_suspect, sequence.num_failed_alone = False, 0
            sequence.num_inflight_tokens -= 1
            sequence.num_computed_tokens += max(accepted - 1, 0)
        self._learn_from(sequence, row)
        token_ids = row.token_ids[:accepted]
        sequence.num_prompt_logprobs += len(row.prompt_logprobs)
        if sequence.constraint is not None and token_ids and stop_token_id is None:
            sequence.constraint.accept(token_ids)
            if sequence.constraint.is_complete:
                reason = "stop"
        self._register_full_blocks(sequence)
        end = plan_row.start + plan_row.num_tokens
        if not sampling.max_tokens and end >= sequence.num_prompt_tokens:
            reason = "length"
        if reason:
            self.finish(sequence, reason)
        if not (token_ids or row.prompt_logprobs or reason):
            return None
        return SequenceOutput(
            index=sequence.index,
            token_ids=token_ids,
            logprobs=row.logprobs[:accepted],
            prompt_logprobs=row.prompt_logprobs,
            num_cached_tokens=sequence.num_cached_tokens,
            finish_reason=reason,
            stop_token_id=stop_token_id,
        )

    def _learn_from(self, sequence: Sequence, row: RowResult) -> None:
        """Tell a sequence's drafter how many of its guesses were right."""
        if sequence.num_guessed and sequence.drafter is not None:
            num_right = len(row.token_ids) - 1
            sequence.drafter.learn(sequence.num_guessed, num_right)
            self.counters.num_accepted_tokens += num_right
            sequence.num_guessed = 0

    def _fail_row(self, sequence: Sequence, error: str, *, is_refused: bool) -> Update:
        """End a sequence whose own row went wrong; what it computed is not to be shared."""
        for block in sequence.blocks:
            self.allocator.forget(block)
        self.finish(sequence, "error")
        output = SequenceOutput(
            index=sequence.index, finish_reason="error", error=error, is_refused=is_refused
        )
        return Update(sequence, output)

    def fail(self, steps: list[ScheduledStep]) -> list[Update]:
        """Clean up after steps that broke; return the end of the sequence that breaks them.

        Nobody knows what the device holds now, so all rows are left and the cache is emptied. All
        sequences start over from their tokens; those of the steps are tried in ever smaller groups
        until one fails alone, twice, and ends. The others go on as if nothing had been.
        """
        self.counters.num_failed_steps += len(steps)
        self.allocator.forget_all()
        involved = []
        for step in steps:
            self._removed_rows += step.plan.removed  # the runner may not have come that far
            for sequence, epoch in zip(step.sequences, step.epochs, strict=True):
                if sequence.epoch == epoch and sequence not in involved:
                    involved.append(sequence)
        for sequence in reversed(list(self.running)):
            self._preempt(sequence)
        guilty = self._suspects.split(involved)
        if guilty is None:
            return []
        self.counters.num_isolated += 1
        self.finish(guilty, "error")
        error = "the step that carried this request failed"
        return [
            Update(guilty, SequenceOutput(index=guilty.index, finish_reason="error", error=error))
        ]

    def clear_rows(self) -> None:
        """Have all rows removed in the next step: somebody else has used one. Nobody runs."""
        assert not self.running
        self._removed_rows = list(range(self.limits.max_num_seqs))

    def rebuilt(self, requests: Iterable[Request]) -> "Scheduler":
        """Return a new scheduler in place of a broken one: the same requests, from their tokens."""
        fresh = Scheduler(
            self.limits,
            enable_prefix_caching=self._enable_prefix_caching,
            speculation=self._speculation,
            tenant_weights=self._tenant_weights,
        )
        fresh.counters = self.counters
        fresh._num_requests = self._num_requests
        fresh._removed_rows = list(range(self.limits.max_num_seqs))
        for request in requests:
            request.root_key = fresh._hasher.root(None, request.cache_salt)
            for sequence in request.sequences:
                if sequence.finish_reason is None:
                    sequence.leave_row()
                    sequence.block_keys = []
                    sequence.is_suspect = False
                    fresh.shares.arrive(request.tenant)
                    fresh.waiting.push(sequence)
        return fresh

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, blocks and queues agree with each other."""
        rows = [sequence.row for sequence in self.running]
        assert sorted([*self._free_rows, *(row for row in rows if row is not None)]) == list(
            range(self.limits.max_num_seqs)
        )
        assert self.shares.rows == Counter(sequence.request.tenant for sequence in self.running)
        orders = [sequence.order for sequence in self.running]
        assert orders == sorted(set(orders))
        for sequence in self.running:
            assert sequence.finish_reason is None
            assert self._num_blocks(sequence.num_computed_tokens) <= len(sequence.blocks)
            assert sequence.num_computed_tokens <= sequence.num_tokens
        for sequence in self.waiting:
            assert sequence.row is None
            assert not sequence.blocks
            assert sequence.finish_reason is None
        self.allocator.check_integrity(sequence.blocks for sequence in self.running)
