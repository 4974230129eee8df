"""Tokenizers that the `tokenizers` library runs: any tokenizer.json of a Llama, and what is
rebuilt as one from GGUF's byte-level BPE or tiktoken's ranks.

Knows the library's JSON. `PlainFast` is the same tokenizer bereft of its added tokens.
"""

import json
import threading
from collections.abc import Mapping
from typing import cast

import tokenizers

from model.config import shown
from model.errors import TokenizerError
from model.tokenizers.vocabulary import (
    AddedToken,
    TokenizerFacts,
    VocabularyTokenizer,
    by_id,
    byte_level_bytes,
    piece_bytes,
)

Json = dict[str, object]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PlainFast:
    """Encodes with every added token switched off; built when first needed, once."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._built: tuple[tokenizers.Tokenizer, tokenizers.Tokenizer] | None = None

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        first, rest = self._tokenizers()
        ids: list[int] = (first if is_start else rest).encode(text, add_special_tokens=False).ids
        return ids

    def _tokenizers(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        with self._lock:
            if self._built is None:
                spec = _without_added_tokens(cast(Json, json.loads(self._library.to_str())))
                first = tokenizers.Tokenizer.from_str(json.dumps(spec))
                later = _prepending_never(spec)
                is_same = later == spec
                rest = first if is_same else tokenizers.Tokenizer.from_str(json.dumps(later))
                self._built = first, rest
            return self._built


def fast_tokenizer(
    library: tokenizers.Tokenizer, facts: TokenizerFacts, where: str
) -> VocabularyTokenizer:
    """Wrap a tokenizer of the library, whose truncation and padding are switched off."""
    library.no_truncation()
    library.no_padding()
    kind = type(library.model).__name__
    if kind not in ("BPE", "Unigram"):
        raise TokenizerError(f"{where}: model.type is {shown(kind)}, not read here")
    tokens = by_id(library.get_vocab(with_added_tokens=True), where)
    kinds = _types(_spec(library.decoder)) or _types(_spec(library.pre_tokenizer))
    if "ByteLevel" in kinds:
        token_bytes = byte_level_bytes(tokens)
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        has_byte_pieces = "ByteFallback" in kinds or _falls_back_to_bytes(library)
        token_bytes = [piece_bytes(token, has_byte_pieces) for token in tokens]
    else:
        raise TokenizerError(f"{where}: decoder is neither byte-level nor sentencepiece's")

    def encode_whole(text: str) -> list[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return VocabularyTokenizer(
        PlainFast(library),
        token_bytes=token_bytes,
        added_tokens=added_tokens_of(library),
        facts=facts,
        encode_whole=encode_whole,
    )


def parse_tokenizer_json(text: str, where: str) -> tokenizers.Tokenizer:
    """Build the library's tokenizer from its JSON. Raises TokenizerError."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).partition("\n")[0][:200]
        raise TokenizerError(f"{where}: the tokenizer cannot be built: {reason}") from error


def added_tokens_of(library: tokenizers.Tokenizer) -> list[AddedToken]:
    """Return a tokenizer's added tokens by id."""
    return [
        AddedToken(
            id=token_id,
            text=token.content,
            special=token.special,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
        )
        for token_id, token in sorted(library.get_added_tokens_decoder().items())
    ]


def byte_level_tokenizer(
    *,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: Json,
    added: list[AddedToken],
    ignore_merges: bool,
    where: str,
) -> tokenizers.Tokenizer:
    """Build a byte-level BPE. `ignore_merges`: a word that is a token is not merged up to it."""
    spec: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level(use_regex=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": {},
            "merges": [],
        },
    }
    library = parse_tokenizer_json(json.dumps(spec), where)
    try:
        # Handed over as they are: a vocabulary written as JSON and read again takes twice as long.
        library.model = tokenizers.models.BPE(
            vocab=dict(vocab), merges=merges, ignore_merges=ignore_merges
        )
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{where}: the tokenizer cannot be built: {error}") from error
    library.add_tokens(
        [
            tokenizers.AddedToken(
                token.text,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=token.special,
            )
            for token in added
        ]
    )
    # The library numbers what is not in the vocabulary itself, from its end on.
    for token in added:
        if library.token_to_id(token.text) != token.id:
            raise TokenizerError(f"{where}: {shown(token.text)} cannot have the id {token.id}")
    return library


def byte_level(*, use_regex: bool) -> Json:
    """Spell the byte-level step; `use_regex` splits by GPT-2's pattern first."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split_then_byte_level(pattern: str) -> Json:
    """Spell a pre-tokenizer that isolates each match of a pattern."""
    split: Json = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


def _spec(component: object) -> object:
    """Return a component as JSON; its vocabulary is not written out for that."""
    state: bytes = b"null" if component is None else component.__getstate__()  # type: ignore
    return json.loads(state)


def _falls_back_to_bytes(library: tokenizers.Tokenizer) -> bool:
    """Say whether the model has a piece for each byte, which only its JSON tells for all kinds."""
    model = cast(Json, json.loads(library.to_str()))["model"]
    return bool(cast(Json, model).get("byte_fallback"))


def _types(component: object) -> set[str]:
    """Return the types of a component and of those inside it."""
    if isinstance(component, list):
        return {kind for inner in component for kind in _types(inner)}
    if not isinstance(component, dict):
        return set()
    inner = (component.get(key) for key in ("decoders", "pretokenizers", "normalizers"))
    found = {kind for part in inner for kind in _types(part)}
    if component.get("type") == "Replace" and component.get("content") != " ":
        return found
    return found | {str(component.get("type"))}


def _without_added_tokens(spec: Json) -> Json:
    """Take away added tokens, and every way in which plain text could still become a special one.

    A special token that is also in the model's vocabulary would come back through merges, through
    ignore_merges or, in a unigram model, as any other piece. So merges into it go, and its text is
    changed into one with a space, which no encoder of these kinds ever looks up.
    """
    added = cast(list[Json], spec["added_tokens"])
    # One character is the least that text can be made of: without it, it could not be encoded.
    special = {str(token["content"]) for token in added if token["special"]}
    special = {text for text in special if len(text) > 1}
    model = dict(cast(Json, spec["model"]))
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {
            f"added {token}" if token in special else token: token_id
            for token, token_id in vocab.items()
        }
        merges = cast(list[list[str]], model["merges"])
        model["merges"] = [
            pair for pair in merges if not special.intersection(("".join(pair), *pair))
        ]
        if model.get("unk_token") in special:
            model["unk_token"] = f"added {model['unk_token']}"
    else:
        model["vocab"] = [
            [f"added {token}" if token in special else token, score]
            for token, score in cast(list[tuple[str, float]], vocab)
        ]
    return spec | {"added_tokens": [], "post_processor": None, "model": model}


def _prepending_never(spec: Json) -> Json:
    """Switch off the space that Metaspace puts before the first word of a text alone."""

    def walk(component: object) -> object:
        if isinstance(component, list):
            return [walk(inner) for inner in component]
        if not isinstance(component, dict):
            return component
        walked = {key: walk(value) for key, value in component.items()}
        if walked.get("type") == "Metaspace" and walked.get("prepend_scheme") == "first":
            walked["prepend_scheme"] = "never"
        return walked

    return spec | {"pre_tokenizer": walk(spec.get("pre_tokenizer"))}
