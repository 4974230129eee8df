"""One sequence's ids into the text its user gets: detokenised, cut at the first stop string.

Owns how many ids count once a stop string is complete. Knows nothing of events or wire formats.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from app.text.detokenize import IncrementalDetokenizer
from app.text.stop import StopMatch, StopMatcher
from model.tokenizer import Tokenizer


@dataclass(slots=True)
class TextDelta:
    """Text to give out, how many of the ids just given count, and the stop string if one cut it."""

    text: str
    num_tokens: int
    stop: str | None = None


_NOTHING = TextDelta("", 0)


class OutputText:
    """Turn pushes of ids into text; the same text whatever the pushes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_token_ids: Collection[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, shown_token_ids=shown_token_ids
        )
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._is_over = False

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next ids. Those after the one that completes a stop string do not count."""
        if self._is_over:
            return _NOTHING
        if self._matcher is None:
            return TextDelta(self._detokenizer.push(token_ids), len(token_ids))
        pieces: list[str] = []
        for num_taken, token_id in enumerate(token_ids, start=1):
            found = self._matcher.push(self._detokenizer.push((token_id,)))
            if isinstance(found, StopMatch):
                return self._cut(pieces, found, num_taken)
            pieces.append(found)
        return TextDelta("".join(pieces), len(token_ids))

    def finish(self) -> TextDelta:
        """Give out what was held back: bytes short of a character, text short of a stop string.

        The U+FFFD of such bytes may itself complete a stop string.
        """
        if self._is_over:
            return _NOTHING
        text = self._detokenizer.flush()
        if self._matcher is not None:
            found = self._matcher.push(text)
            if isinstance(found, StopMatch):
                return self._cut([], found, 0)
            text = found + self._matcher.flush()
        self._is_over = True
        return TextDelta(text, 0)

    def _cut(self, pieces: list[str], match: StopMatch, num_tokens: int) -> TextDelta:
        self._is_over = True
        text = "".join(pieces) + match.text + (match.stop if self._include_stop else "")
        return TextDelta(text, num_tokens, match.stop)
