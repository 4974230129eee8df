"""A compiled grammar at work in one sequence: masks of ids, advanced by what was sampled.

Method and library: llguidance (Earley parser over derivatives of regular expressions, masks from
a trie of the vocabulary). Its calls let go of the interpreter while they compute.
"""

from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

from model.step import ConstraintFailed, MaskBuffer


class GrammarConstraint:
    """TokenConstraint over one matcher, which it owns. `on_failure` may be called by any thread."""

    def __init__(self, matcher: LLMatcher, on_failure: Callable[[], None]) -> None:
        self._matcher = matcher
        self._on_failure = on_failure

    def fill(self, buffer: MaskBuffer) -> None:
        words = np.frombuffer(buffer, dtype=np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    def accept(self, token_ids: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(token_ids))
        self._check()

    def rollback(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)
        self._check()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        return self._matcher.validate_tokens(list(token_ids))

    def forced(self) -> Sequence[int]:
        return self._matcher.compute_ff_tokens()

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def restarted(self, token_ids: Sequence[int]) -> "GrammarConstraint":
        # Not from the compiled one: to hold that would keep all that it grows to.
        matcher = self._matcher.deep_copy()
        matcher.reset()
        constraint = GrammarConstraint(matcher, self._on_failure)
        constraint.accept(token_ids)
        return constraint

    def _check(self) -> None:
        if self._matcher.is_error():
            self._on_failure()
            raise ConstraintFailed("the grammar became too complex while the text was generated")
