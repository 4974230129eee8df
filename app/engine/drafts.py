"""Speculation by prompt lookup: what followed the same words before, guessed to follow again.

Owns the guesses of one sequence and how many are worth making; token ids only. Whether a guess
was right is the runner's to say, and what room a step has for guesses is the scheduler's: a wrong
one costs time, never a token. Reference: Saxena, "Prompt Lookup Decoding" (2023), vLLM's `ngram`.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

MAX_CANDIDATES = 16  # earlier places looked at in one lookup
MAX_PAUSE = 16  # steps without a guess while guesses keep failing


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramSpeculation:
    """vLLM's `speculative_config` of method ngram: how far to guess, and from what."""

    num_speculative_tokens: int
    prompt_lookup_max: int = 5  # longest n-gram that is looked up
    prompt_lookup_min: int = 5


class NgramIndex:
    """Where the n-grams of a growing list of ids ended: deflate's hash chains (RFC 1951, 4).

    ::

        heads[hash of the n ids before p]  ->  p, the latest  ->  previous[p]  -> ...  -> -1

    8 to 12 bytes a token, a few operations for each new one. Different n-grams may share a chain,
    so what a chain names is compared id by id.
    """

    def __init__(self, length: int, capacity: int) -> None:
        self._length = length
        self._mask = (1 << max(4, capacity.bit_length())) - 1
        self._heads = array("i", [-1]) * (self._mask + 1)
        self._previous = array("i", [-1]) * length  # indexed by the end of an n-gram

    def find(self, token_ids: Sequence[int], max_length: int) -> int | None:
        """Return where the longest suffix of the list ended before; of several, the latest.

        Suffixes of `length` to `max_length` ids count. The list is that of the last call, grown.
        """
        end = len(token_ids)
        for position in range(len(self._previous), end):
            bucket = self._bucket(token_ids, position)
            self._previous.append(self._heads[bucket])
            self._heads[bucket] = position
        if end <= self._length:
            return None
        best, best_length = None, self._length - 1
        position = self._heads[self._bucket(token_ids, end)]
        for _ in range(MAX_CANDIDATES):
            if position < 0 or best_length == max_length:
                break
            length = 0
            limit = min(max_length, position)
            while length < limit and token_ids[position - 1 - length] == token_ids[-1 - length]:
                length += 1
            if length > best_length:
                best, best_length = position, length
            position = self._previous[position]
        return best

    def _bucket(self, token_ids: Sequence[int], end: int) -> int:
        return hash(tuple(token_ids[end - self._length : end])) & self._mask


class Drafter:
    """Guesses for one sequence, fewer after wrong ones.

    As many are made as the last step accepted and one more, twice as many after a step that
    accepted all. When none is accepted it pauses: 1 step, then 2, 4 ... `MAX_PAUSE`. So text
    that does not repeat itself pays for one wrong guess in `MAX_PAUSE` + 1 steps.
    """

    def __init__(self, speculation: NgramSpeculation, capacity: int) -> None:
        self._speculation = speculation
        self._index = NgramIndex(speculation.prompt_lookup_min, capacity)
        self._num_wanted = speculation.num_speculative_tokens
        self._pause = 0
        self._num_skips = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> tuple[int, ...]:
        """Return up to `limit` ids that may follow; none in a pause, or if nothing matches."""
        if self._num_skips:
            self._num_skips -= 1
            return ()
        start = self._index.find(token_ids, self._speculation.prompt_lookup_max)
        if start is None:
            return ()
        # A copy may run into itself: the end of a list that repeats goes on repeating.
        period = len(token_ids) - start
        count = min(limit, self._num_wanted)
        return tuple(token_ids[start + offset % period] for offset in range(count))

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        if not num_accepted:
            self._num_wanted = 1
            self._pause = self._num_skips = min(MAX_PAUSE, 2 * self._pause or 1)
            return
        self._pause = 0
        self._num_wanted = num_accepted + 1
        if num_accepted == num_drafts:
            wanted = max(2 * num_drafts, self._num_wanted)
            self._num_wanted = min(wanted, self._speculation.num_speculative_tokens)
