"""A tokenizer as two parts: added tokens, found in the text, and what lies between them.

`VocabularyTokenizer` is the one implementation of the protocol. It owns the rule of where added
tokens count, BOS and the bytes of ids; a `PlainEncoder` (tokenizers or sentencepiece) encodes the
stretches between. Knows no file.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import tokenizers

from model.errors import TokenizerError
from model.tokenizer import UnencodableText

MAX_TOKENS = 2**24  # more than any vocabulary: an id in a file is no reason to allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A text that is one id wherever it appears; the flags are those of `tokenizers`."""

    id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What a tokenizer's files say beside the vocabulary."""

    special_token_texts: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    adds_bos: bool = False
    eos_token_ids: tuple[int, ...] = ()


class PlainEncoder(Protocol):
    """Encodes text in which no added token counts."""

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Encode a stretch; `is_start` says that nothing, not even an added token, precedes it."""
        ...


class VocabularyTokenizer:
    """The protocol's implementation; immutable, so that threads may share it."""

    def __init__(
        self,
        plain: PlainEncoder,
        *,
        token_bytes: Sequence[bytes],
        added_tokens: Iterable[AddedToken],
        facts: TokenizerFacts,
        encode_whole: Callable[[str], list[int]] | None = None,
    ) -> None:
        """Take `encode_whole` where the library parses added tokens on its own, and faster."""
        self._plain = plain
        self._encode_whole = encode_whole
        self._added = {token.text: token for token in added_tokens if token.text}
        self._finder = _finder(self._added.values())
        self._found_ids = {
            self._finder.token_to_id(token.text): token.id for token in self._added.values()
        }
        size = max([len(token_bytes), *(token.id + 1 for token in self._added.values())])
        self._bytes = [*token_bytes, *(b"" for _ in range(size - len(token_bytes)))]
        for token in self._added.values():
            self._bytes[token.id] = token.text.encode()
        self._whole_texts: dict[int, str | None] = {}  # of the ids that have been asked for
        self._special_ids = frozenset(token.id for token in self._added.values() if token.special)
        self._facts = facts
        bos = self._added.get(facts.special_token_texts.get("bos_token", ""))
        self._bos_token_id = bos.id if bos else None

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._facts.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        return self._facts.chat_template

    @property
    def special_token_texts(self) -> dict[str, str]:
        return dict(self._facts.special_token_texts)

    @property
    def added_tokens(self) -> dict[str, int]:
        return {text: token.id for text, token in self._added.items()}

    def encode(
        self, text: str, *, add_special_tokens: bool, parse_special: bool = True
    ) -> list[int]:
        ids = self.encode_segments([(text, parse_special)])
        bos = self._bos_token_id
        if add_special_tokens and self._facts.adds_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def encode_segments(self, segments: list[tuple[str, bool]]) -> list[int]:
        text = "".join(piece for piece, _ in segments)
        _refuse_surrogates(text)
        if self._encode_whole is not None and all(parse for _, parse in segments):
            return self._encode_whole(text)
        ids: list[int] = []
        at = 0
        for start, end, token_id in self._matches(segments):
            if start > at:
                ids += self._plain.encode(text[at:start], is_start=at == 0)
            ids.append(token_id)
            at = end
        if at < len(text):
            ids += self._plain.encode(text[at:], is_start=at == 0)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return an id's bytes; none for one that the embedding has and the vocabulary has not."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def whole_text(self, token_id: int) -> str | None:
        """Return an id's text if its bytes are whole characters; None for parts of one."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            text: str | None = None
            with contextlib.suppress(UnicodeDecodeError):
                text = self.token_bytes(token_id).decode()
            if 0 <= token_id < len(self._bytes):  # no more entries than there are ids
                self._whole_texts[token_id] = text
            return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _matches(self, segments: list[tuple[str, bool]]) -> Iterable[tuple[int, int, int]]:
        """Yield start, end and id of each added token that counts.

        Neighbouring pieces that allow parsing are searched as one; a piece that forbids it, even
        an empty one, parts them.
        """
        at = 0
        run: list[str] = []
        for piece, parse in [*segments, ("", False)]:
            if parse:
                run.append(piece)
                continue
            stretch = "".join(run)
            run = []
            if stretch and self._added:
                found = self._finder.encode(stretch, add_special_tokens=False)
                for finder_id, (start, end) in zip(found.ids, found.offsets, strict=True):
                    yield at + start, at + end, self._found_ids[finder_id]
            at += len(stretch) + len(piece)


def check_vocab_size(tokenizer: VocabularyTokenizer, expected: int | None, where: str) -> None:
    """Refuse a tokenizer with ids that the model's embedding has not. Raises TokenizerError."""
    if expected is not None and tokenizer.vocab_size > expected:
        raise TokenizerError(
            f"{where}: has ids up to {tokenizer.vocab_size - 1}, "
            f"but the model's embedding has only {expected} rows"
        )


def _finder(added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
    """Build a tokenizer that knows no text but the added tokens: tokenizers' own matching rules."""
    finder = tokenizers.Tokenizer(tokenizers.models.BPE())
    finder.add_tokens(
        [
            tokenizers.AddedToken(
                token.text,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
            )
            for token in added
        ]
    )
    return finder


def _refuse_surrogates(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnencodableText(
            f"text holds half of a surrogate pair (U+{ord(text[error.start]):04X}) "
            f"at character {error.start}, which no encoding has"
        ) from error


def byte_level_bytes(tokens: Iterable[str]) -> list[bytes]:
    """Return the bytes that GPT-2's byte alphabet spells with each token."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in frozenset(visible)]
    table = dict.fromkeys(others, 65535)  # not letters of the alphabet: Latin-1 refuses them
    table |= {0x100 + place: byte for place, byte in enumerate(others)}
    found = []
    for token in tokens:
        try:
            found.append(token.translate(table).encode("latin-1"))
        except UnicodeEncodeError:  # not spelt in the alphabet: it is its own text
            found.append(token.encode())
    return found


_HEX_DIGITS = frozenset("0123456789ABCDEFabcdef")


def piece_bytes(piece: str, has_byte_pieces: bool) -> bytes:
    """Return the bytes of a sentencepiece piece: ▁ is a space, <0xNN> one byte."""
    if has_byte_pieces and len(piece) == 6 and piece.startswith("<0x") and piece[5] == ">":
        digits = piece[3:5]
        if _HEX_DIGITS.issuperset(digits):
            return bytes.fromhex(digits)
    return piece.replace("▁", " ").encode()


def by_id(vocab: Mapping[str, int], where: str) -> list[str]:
    """Order a vocabulary by id; ids without a token get an empty text. Raises TokenizerError."""
    ids = sorted(vocab.values())
    if not ids or ids[0] < 0 or ids[-1] >= MAX_TOKENS:
        raise TokenizerError(f"{where}: the vocabulary is empty or its ids are out of range")
    tokens = [""] * (ids[-1] + 1)
    for token, token_id in vocab.items():
        tokens[token_id] = token
    return tokens
