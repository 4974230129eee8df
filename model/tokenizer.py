"""Ids and text: the protocol every tokenizer of ours follows, and how one is found."""

from typing import Protocol

from model.errors import TokenizerError


class UnencodableText(TokenizerError, ValueError):
    """Raised for text that is not Unicode: half of a surrogate pair on its own."""


class Tokenizer(Protocol):
    """Turn text into ids and ids into the exact bytes they stand for. Safe to share by threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a meaning."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ends of text that the tokenizer's own files name."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template."""
        ...

    @property
    def special_token_texts(self) -> dict[str, str]:
        """Names to texts of the tokens that a template may use: bos_token, eos_token, …"""
        ...

    @property
    def added_tokens(self) -> dict[str, int]:
        """All texts that are one id whatever surrounds them: control and added tokens."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        """Encode text; `add_special_tokens` puts BOS in front exactly once.

        Without `parse_special` the text of an added token is plain text.
        """
        ...

    def encode_segments(self, segments: list[tuple[str, bool]]) -> list[int]:
        """Encode a text given in pieces, each with whether added tokens in it are parsed.

        Same ids as `encode` of the joined text (no BOS added) where no piece forbids parsing.
        An added token counts only if it lies wholly in pieces that allow it.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes of an id; a special token's are those of its text."""
        ...

    def whole_text(self, token_id: int) -> str | None:
        """Return an id's text if its bytes are whole characters; None for parts of one."""
        ...

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which `skip_special_tokens` leaves out of text."""
        ...
