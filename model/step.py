"""The seam between policy and tensors: what one step shall do, and what it did.

Plain ints, floats and tuples, no torch: the scheduler is tested against a scripted fake in
microseconds, the HTTP service without weights, and a plan can be sent to other processes.

One step, seen from the worker thread::

    handle = runner.launch(plan, fill_masks)   forward pass, masks, sampling
    ...                                        a later step may be launched here
    result = runner.collect(handle)            token ids as Python ints

`launch` may return before the device has finished. Up to `RunnerLimits.max_inflight` steps
may be launched before the first of them is collected, so a plan never holds a sampled value:
a sampled id stays in the row's token log on the device, and the next step reads it there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen, and when it has enough of them.

    The order is vLLM's: masks (min_tokens, allowed, bad words, constraint), logit bias and
    penalties, temperature, min_p, then top_k and top_p. `temperature == 0` is greedy.
    Log-probabilities are those of the unmodified logits.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int = 0  # 64 bits; keys Philox together with `choice`
    choice: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # ends of text included, unless ignored
    logprobs: int | None = None  # alternatives to report; 0: the chosen token alone
    prompt_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence that becomes resident: its row holds its state until it is removed."""

    row: int
    token_ids: tuple[int, ...]  # prompt, then what was generated before a preemption
    num_prompt_tokens: int
    sampling: SamplingParams
    adapter: int | None = None


@dataclass(slots=True, kw_only=True)
class PlanRow:
    """What one resident sequence does in one step.

    ::

        | computed before | num_tokens of this step                      |
        0 ............... start ............ logits_from ........ start + num_tokens
                                             | positions with logits     |

    The input ids of positions below the row's known length come from its token log; the last
    `len(draft_token_ids)` positions are drafts. With `sample`, the logits of the last
    1 + drafts positions are sampled or verified and the tokens appended to the row's log.
    """

    row: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...] = ()  # appended to the row's block table before the step
    logits_from: int
    sample: bool
    draft_token_ids: tuple[int, ...] = ()
    mask_slot: int | None = None  # first of 1 + drafts consecutive mask buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step of the whole batch. `removed` takes effect first, then `added`, then `rows`.

    Removing a row that holds nothing is fine: after a failed step nobody can know. Rows of one
    step may share blocks that the step itself writes: in every layer, all K/V of the step is
    written before any of it is read.
    """

    step_id: int
    removed: tuple[int, ...] = ()
    added: tuple[NewRow, ...] = ()
    rows: tuple[PlanRow, ...] = ()
    num_mask_slots: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The log-probability of one token, with the most likely alternatives in falling order."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True, kw_only=True)
class RowResult:
    """What one plan row produced: no token (its prompt is not done) or one to 1 + drafts.

    `prompt_logprobs` holds an entry for each prompt token at the positions
    logits_from + 1 ... that this step's logits predict. With `error` the row has no tokens.
    """

    row: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The outcome of a plan; `rows` are in the order of the plan's rows."""

    step_id: int
    rows: tuple[RowResult, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """What a runner was built for; the scheduler plans within it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    vocab_size: int
    max_inflight: int = 1  # 1: `launch` completes the step


@dataclass(slots=True, kw_only=True)
class StepHandle:
    """A launched step. A runner subclasses it to keep what `collect` needs."""

    plan: StepPlan
    result: StepResult | None = field(default=None)


MaskBuffer = memoryview
"""A writable view of ceil(V / 32) unsigned 32-bit words; bit i of word w allows id 32 w + i."""

FillMasks = Callable[[Sequence[MaskBuffer]], None]
"""Called once a step by the runner, while the forward pass runs, with one buffer a mask slot.

The buffers come all ones (everything allowed)."""


class ConstraintFailed(Exception):
    """A constraint cannot go on: a limit was reached. Costs its own sequence, with this message."""


class TokenConstraint(Protocol):
    """What may follow in one sequence: a grammar, a schema, a list of choices.

    `fill`, `accept` and `rollback` may raise ConstraintFailed; one that has failed forces and
    allows nothing. Used by one thread at a time.
    """

    def fill(self, buffer: MaskBuffer) -> None:
        """Write the mask of ids allowed next."""

    def accept(self, token_ids: Sequence[int]) -> None:
        """Advance over tokens that were sampled."""

    def rollback(self, num_tokens: int) -> None:
        """Take back the last accepted tokens."""

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these ids, from the first on, could follow one after the other."""
        ...

    def forced(self) -> Sequence[int]:
        """Return ids that spell what must follow; empty if the model has a choice."""
        ...

    @property
    def is_complete(self) -> bool:
        """True once nothing but an end of text can follow."""
        ...

    def restarted(self, token_ids: Sequence[int]) -> "TokenConstraint":
        """Return a new one that has accepted these ids and nothing else."""
        ...


class Runner(Protocol):
    """Owns the model on a device. Called by one thread only.

    When `launch` or `collect` raises, every step in flight is abandoned: none of them will be
    collected, and all rows will be removed before they are used again.
    """

    @property
    def limits(self) -> RunnerLimits: ...

    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        """Start a step; `fill_masks` is called between its forward pass and its sampling."""
        ...

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return its result. Steps are collected in order of launch."""
        ...
