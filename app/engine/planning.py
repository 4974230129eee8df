"""One step's plan in the making, and what is kept of it until its result comes.

Owns which mask slots a plan's rows have and who fills them. Knows nothing of how tokens and
blocks are shared out.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from app.engine.request import Sequence
from model.step import (
    ConstraintFailed,
    MaskBuffer,
    NewRow,
    PlanRow,
    StepPlan,
    TokenConstraint,
)


@dataclass(frozen=True, slots=True)
class Constrained:
    """A sequence whose constraint masks the tokens behind `drafts`, each and the last."""

    sequence: Sequence
    constraint: TokenConstraint
    drafts: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class ScheduledStep:
    """A plan with what is needed to make sense of its result.

    `epochs` is parallel to `sequences` and to the plan's rows: a result counts only if the
    sequence has not left its row since. `constrained` fill the mask slots, in order, one for each
    draft and one more. `broken` takes the constraints that failed to, with a message.
    """

    plan: StepPlan
    sequences: list[Sequence]
    epochs: list[int]
    constrained: list[Constrained]
    broken: dict[Sequence, str] = field(default_factory=dict)


@dataclass(slots=True)
class OpenStep:
    """A plan in the making. `budget` is what is left for sequences more than a token behind."""

    budget: int
    rows: list[PlanRow] = field(default_factory=list)
    added: list[NewRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)

    def give_mask_slots(self) -> tuple[list[Constrained], int]:
        """Number the masks of the rows; return whose they are, and how many."""
        constrained = []
        num_slots = 0
        for place, (row, sequence) in enumerate(zip(self.rows, self.sequences, strict=True)):
            if row.sample and sequence.constraint is not None:
                drafts = row.draft_token_ids
                self.rows[place] = replace(row, mask_slot=num_slots)
                constrained.append(Constrained(sequence, sequence.constraint, drafts))
                num_slots += 1 + len(drafts)
        return constrained, num_slots


def fill_masks(step: ScheduledStep, buffers: SequenceOf[MaskBuffer]) -> None:
    """Have a step's constraints write their masks; those that fail are noted in `broken`."""
    place = 0
    for each in step.constrained:
        end = place + 1 + len(each.drafts)
        try:
            each.constraint.fill(buffers[place])
            for num_taken, draft in enumerate(each.drafts, start=1):
                each.constraint.accept((draft,))
                each.constraint.fill(buffers[place + num_taken])
            if each.drafts:
                each.constraint.rollback(len(each.drafts))
        except ConstraintFailed as error:
            step.broken[each.sequence] = str(error)
            for buffer in buffers[place:end]:
                buffer.cast("B")[:] = b"\xff" * buffer.nbytes  # anything: its token is not taken
        place = end
