"""The tokenizer inside a GGUF header: byte-level BPE ("gpt2") and sentencepiece's BPE ("llama").

Knows llama.cpp's field names, its names of pre-tokenizers and its defaults for fields that are
not there. Reference: src/llama-vocab.cpp of ggml-org/llama.cpp.
"""

from collections.abc import Mapping

from model.config import shown
from model.errors import TokenizerError
from model.tokenizers.fast import (
    LLAMA3_SPLIT,
    Json,
    byte_level,
    byte_level_tokenizer,
    fast_tokenizer,
    split_then_byte_level,
)
from model.tokenizers.sentencepiece_model import (
    Piece,
    PieceKind,
    build_model,
    sentencepiece_tokenizer,
)
from model.tokenizers.vocabulary import AddedToken, TokenizerFacts, VocabularyTokenizer

_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("default", "gpt-2", "gpt2")  # "default": a converter that did not know better
_DIGITS_APART = ("smollm", "starcoder", "refact")
_LLAMA3_MERGED = ("llama3", "llama-v3", "llama-bpe")
_LLAMA3_LIKE = ("dbrx", "smaug-bpe")
_NAMED_IDS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_PREFIX = "tokenizer.ggml."


def tokenizer_from_gguf_fields(fields: Mapping[str, object], where: str) -> VocabularyTokenizer:
    """Build the tokenizer that a GGUF header holds. Raises TokenizerError."""
    kind = _text(fields, "model", where)
    if kind == "gpt2":
        return _byte_level(fields, where)
    if kind == "llama":
        return _sentencepiece(fields, where)
    raise TokenizerError(f"{where}: {_PREFIX}model is {shown(kind)}, neither gpt2 nor llama")


def _byte_level(fields: Mapping[str, object], where: str) -> VocabularyTokenizer:
    pre = _text(fields, "pre", where, "default")
    pre_tokenizer = _pre_tokenizer(pre, where)
    tokens = _texts(fields, "tokens", where)
    kinds = _kinds(fields, len(tokens), where)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise TokenizerError(f"{where}: {_PREFIX}tokens holds a token twice")
    added = [
        AddedToken(id=token_id, text=token, special=kind != PieceKind.USER_DEFINED)
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED) and token
    ]
    merges = []
    for merge in _texts(fields, "merges", where):
        left, space, right = merge.partition(" ")
        if not space:
            raise TokenizerError(f"{where}: {_PREFIX}merges holds {shown(merge)}, not a pair")
        merges.append((left, right))
    is_llama3 = pre in _LLAMA3_MERGED or pre == "tekken"
    library = byte_level_tokenizer(
        vocab=vocab,
        merges=merges,
        pre_tokenizer=pre_tokenizer,
        added=added,
        ignore_merges=is_llama3,
        where=where,
    )
    return fast_tokenizer(library, _facts(fields, tokens, is_llama3, where), where)


def _sentencepiece(fields: Mapping[str, object], where: str) -> VocabularyTokenizer:
    tokens = _texts(fields, "tokens", where)
    kinds = _kinds(fields, len(tokens), where)
    scores = fields.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{where}: {_PREFIX}scores must hold a number for each token")
    pieces = [
        Piece(token, float(score), kind)
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    ]
    message = build_model(
        pieces,
        add_dummy_prefix=_flag(fields, "add_space_prefix", True, where),
        remove_extra_whitespaces=_flag(fields, "remove_extra_whitespaces", False, where),
    )
    facts = _facts(fields, tokens, True, where)
    return sentencepiece_tokenizer(message, facts, prefixes_always=True, where=where)


def _pre_tokenizer(pre: str, where: str) -> Json:
    if pre in _GPT2:
        return byte_level(use_regex=True)
    if pre in _DIGITS_APART:
        digits: Json = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, byte_level(use_regex=True)]}
    if pre in _LLAMA3_MERGED or pre in _LLAMA3_LIKE:
        return split_then_byte_level(LLAMA3_SPLIT)
    if pre == "tekken":
        return split_then_byte_level(_TEKKEN_SPLIT)
    raise TokenizerError(f"{where}: {_PREFIX}pre is {shown(pre)}, a pre-tokenizer not known here")


def _facts(
    fields: Mapping[str, object], tokens: list[str], adds_bos: bool, where: str
) -> TokenizerFacts:
    def token_id(name: str) -> int | None:
        value = fields.get(f"{_PREFIX}{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            raise TokenizerError(
                f"{where}: {_PREFIX}{name}_token_id is {shown(value)}, not an id of the vocabulary"
            )
        return value

    named = {name: token_id(field) for name, field in _NAMED_IDS.items()}
    ends = (token_id(name) for name in ("eos", "eot", "eom"))
    template = fields.get("tokenizer.chat_template")
    return TokenizerFacts(
        special_token_texts={name: tokens[i] for name, i in named.items() if i is not None},
        chat_template=template if isinstance(template, str) else None,
        adds_bos=_flag(fields, "add_bos_token", adds_bos, where),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _text(fields: Mapping[str, object], name: str, where: str, default: str | None = None) -> str:
    value = fields.get(_PREFIX + name, default)
    if not isinstance(value, str):
        raise TokenizerError(f"{where}: {_PREFIX}{name} is missing or not a string")
    return value


def _flag(fields: Mapping[str, object], name: str, default: bool, where: str) -> bool:
    value = fields.get(_PREFIX + name, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"{where}: {_PREFIX}{name} must be true or false")
    return value


def _texts(fields: Mapping[str, object], name: str, where: str) -> list[str]:
    value = fields.get(_PREFIX + name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{where}: {_PREFIX}{name} is missing or not a list of strings")
    return value


def _kinds(fields: Mapping[str, object], num_tokens: int, where: str) -> list[PieceKind]:
    value = fields.get(_PREFIX + "token_type")
    if value is None:
        return [PieceKind.NORMAL] * num_tokens
    if not isinstance(value, list) or len(value) != num_tokens:
        raise TokenizerError(f"{where}: {_PREFIX}token_type must hold a type for each token")
    try:
        return [PieceKind(kind) for kind in value]
    except ValueError as error:
        raise TokenizerError(f"{where}: {_PREFIX}token_type: {error}") from error
