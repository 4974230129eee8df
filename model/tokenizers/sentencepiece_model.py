"""Tokenizers that sentencepiece runs: Llama 1 and 2's tokenizer.model, and GGUF's embedded form.

A model of sentencepiece is one protobuf message. The little of that format that is needed is read
and written here: the pieces, and two flags that a later copy of a field overrides.
Reference: src/sentencepiece_model.proto of google/sentencepiece.
"""

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import sentencepiece

from model.errors import TokenizerError
from model.tokenizers.vocabulary import (
    AddedToken,
    TokenizerFacts,
    VocabularyTokenizer,
    piece_bytes,
)


class PieceKind(IntEnum):
    """What a piece is for; GGUF's token types are numbered alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One id of the vocabulary."""

    text: str
    score: float
    kind: PieceKind


class PlainSentencePiece:
    """Encodes with control and user-defined pieces switched off.

    `prefixes_always`: the space before a text is put after every added token too, as Meta's own
    code and llama.cpp do; otherwise at the start alone.
    """

    def __init__(self, message: bytes, *, prefixes_always: bool, where: str) -> None:
        self._message = message
        self._prefixes_always = prefixes_always
        self._first = _processor(message, where)
        self._where = where
        self._lock = threading.Lock()
        self._rest: sentencepiece.SentencePieceProcessor | None = None

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        processor = self._first if is_start or self._prefixes_always else self._later()
        ids: list[int] = processor.encode(text)
        return ids

    def _later(self) -> sentencepiece.SentencePieceProcessor:
        with self._lock:
            if self._rest is None:
                self._rest = _processor(self._message + _NO_DUMMY_PREFIX, self._where)
            return self._rest


def sentencepiece_tokenizer(
    message: bytes,
    facts: TokenizerFacts,
    *,
    added: Sequence[AddedToken] = (),
    prefixes_always: bool,
    where: str,
) -> VocabularyTokenizer:
    """Build from a serialised model; its control and user-defined pieces are added tokens.

    `added` are those that files beside it name, over and above. Raises TokenizerError.
    """
    pieces = list(read_pieces(message, where))
    if not pieces:
        raise TokenizerError(f"{where}: holds no pieces")
    off = b"".join(
        _field(1, _encode_piece(replace(piece, kind=PieceKind.CONTROL)))
        if piece.kind == PieceKind.USER_DEFINED
        else _field(1, _encode_piece(piece))
        for piece in pieces
    )
    rest = b"".join(raw for number, raw, _ in _top_level(message, where) if number != 1)
    own = {
        piece.text: AddedToken(
            id=token_id, text=piece.text, special=piece.kind != PieceKind.USER_DEFINED
        )
        for token_id, piece in enumerate(pieces)
        if piece.kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED, PieceKind.UNKNOWN)
    }
    return VocabularyTokenizer(
        PlainSentencePiece(off + rest, prefixes_always=prefixes_always, where=where),
        token_bytes=[piece_bytes(piece.text, piece.kind == PieceKind.BYTE) for piece in pieces],
        added_tokens=(own | {token.text: token for token in added}).values(),
        facts=facts,
    )


def build_model(
    pieces: Sequence[Piece], *, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> bytes:
    """Serialise a BPE model with the given pieces, no normalisation and byte fallback."""
    ids = dict.fromkeys(PieceKind, -1)
    for token_id, piece in enumerate(pieces):
        if ids[piece.kind] < 0:
            ids[piece.kind] = token_id
    has_bytes = ids[PieceKind.BYTE] >= 0
    trainer = _number(3, 2) + _number(35, int(has_bytes)) + _number(40, ids[PieceKind.UNKNOWN])
    trainer += _number(41, -1) + _number(42, -1) + _number(43, -1)
    if ids[PieceKind.UNKNOWN] >= 0:
        trainer += _field(45, pieces[ids[PieceKind.UNKNOWN]].text.encode())
    normalizer = _number(3, int(add_dummy_prefix)) + _number(4, int(remove_extra_whitespaces))
    normalizer += _number(5, 1)
    message = b"".join(_field(1, _encode_piece(piece)) for piece in pieces)
    return message + _field(2, trainer) + _field(3, normalizer)


def read_pieces(message: bytes, where: str) -> Iterator[Piece]:
    """Yield the pieces of a serialised model in the order of ids. Raises TokenizerError."""
    for number, _, content in _top_level(message, where):
        if number != 1:
            continue
        text, score, kind = "", 0.0, PieceKind.NORMAL
        for inner, _, value in _top_level(content, where):
            try:
                if inner == 1:
                    text = value.decode()
                elif inner == 2:
                    (score,) = struct.unpack("<f", value)
                elif inner == 3:
                    kind = PieceKind(_varint(value, 0, where)[0])
            except (ValueError, struct.error) as error:
                raise TokenizerError(f"{where}: has a malformed piece") from error
        yield Piece(text, score, kind)


def _processor(message: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(message)
    except RuntimeError as error:
        raise TokenizerError(f"{where}: sentencepiece refuses it: {error}") from error
    return processor


def _top_level(message: bytes, where: str) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, whole encoding and content of each field of a message."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at, where)
        wire = key & 7
        if wire == 0:
            content_at = at
            _, at = _varint(message, at, where)
        elif wire in (1, 5):
            content_at, at = at, at + (8 if wire == 1 else 4)
        elif wire == 2:
            length, content_at = _varint(message, at, where)
            at = content_at + length
        else:
            raise TokenizerError(f"{where}: is not a sentencepiece model")
        if at > len(message):
            raise TokenizerError(f"{where}: is cut short, or not a sentencepiece model")
        yield key >> 3, message[start:at], message[content_at:at]


def _varint(message: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise TokenizerError(f"{where}: is cut short, or not a sentencepiece model")


def _encode_varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are written as 64 bits
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number: int, content: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _encode_varint(number << 3) + _encode_varint(value)


def _encode_piece(piece: Piece) -> bytes:
    score = _encode_varint(2 << 3 | 5) + struct.pack("<f", piece.score)
    return _field(1, piece.text.encode()) + score + _number(3, piece.kind)


# A second normalizer_spec in the message overrides the fields that it holds.
_NO_DUMMY_PREFIX = _field(3, _number(3, 0))
