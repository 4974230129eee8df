"""Ids into text, as they come: a character is given out when all its bytes are there.

The definition of decoded text is the bytes of all ids, joined, as UTF-8 with U+FFFD for what is
not; here it is only cut differently. Knows nothing of stop strings.
"""

import codecs
from collections.abc import Collection, Sequence

from model.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decode one sequence's ids. The pieces joined, `flush` last, are the decoded text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown_token_ids: Collection[int] = (),
    ) -> None:
        """`shown_token_ids` are control tokens that are given out as text all the same."""
        self._token_bytes = tokenizer.token_bytes
        self._is_special = tokenizer.is_special
        self._shown = shown_token_ids
        self._skips = skip_special_tokens
        self._whole_text = tokenizer.whole_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_midway = False  # bytes of a character are held back

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the characters that these ids complete."""
        if self._skips:
            token_ids = [
                token_id
                for token_id in token_ids
                if not self._is_special(token_id) or token_id in self._shown
            ]
        if len(token_ids) == 1 and not self._is_midway:
            text = self._whole_text(token_ids[0])
            if text is not None:
                return text  # nearly every token: nothing to decode, nothing held back
        text = self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))
        self._is_midway = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what stands for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
