"""From a path to a tokenizer: which file to read, and what the small files beside it say.

tokenizer.json is preferred, then tokenizer.model (sentencepiece or tiktoken's ranks), then
whatever transformers makes of the folder, which is imported only in that case.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from model.config import shown
from model.errors import ConfigError, TokenizerError
from model.tokenizer import Tokenizer
from model.tokenizers.fast import added_tokens_of, fast_tokenizer, parse_tokenizer_json
from model.tokenizers.gguf import tokenizer_from_gguf_fields
from model.tokenizers.sentencepiece_model import (
    PieceKind,
    read_pieces,
    sentencepiece_tokenizer,
)
from model.tokenizers.tiktoken_ranks import looks_like_ranks, tokenizer_from_ranks
from model.tokenizers.vocabulary import (
    MAX_TOKENS,
    AddedToken,
    TokenizerFacts,
    VocabularyTokenizer,
    check_vocab_size,
)
from model.weights.fields import read_json
from model.weights.gguf import read_gguf

__all__ = ["load_tokenizer", "tokenizer_from_gguf_fields"]

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_MAX_BYTES = 2**28


def load_tokenizer(path: Path, *, expected_vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a folder, a tokenizer.json, a tokenizer.model or a .gguf file.

    Raises TokenizerError, also where it has ids that an embedding of `expected_vocab_size` rows
    has not.
    """
    try:
        tokenizer = _load(path)
    except ConfigError as error:
        raise TokenizerError(str(error)) from error
    check_vocab_size(tokenizer, expected_vocab_size, str(path))
    return tokenizer


def _load(path: Path) -> VocabularyTokenizer:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return _load(path / name)
        return _through_transformers(path)
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return tokenizer_from_gguf_fields(read_gguf(path).fields, str(path))
    beside = _Beside.read(path.parent)
    content = _read(path)
    if path.suffix == ".json":
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: is not UTF-8") from error
        return _from_library(parse_tokenizer_json(text, str(path)), beside, str(path))
    if looks_like_ranks(content):
        return tokenizer_from_ranks(content, beside.chat_template, str(path))
    return _from_sentencepiece(content, beside, str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """What tokenizer_config.json, special_tokens_map.json and chat_template.jinja say."""

    texts: Mapping[str, str]
    added: tuple[AddedToken, ...]
    chat_template: str | None
    adds_bos: bool | None
    legacy: bool

    @classmethod
    def read(cls, folder: Path) -> "_Beside":
        config = _optional_json(folder / "tokenizer_config.json")
        names = _optional_json(folder / "special_tokens_map.json") | config
        texts = {}
        for name in _NAMES:
            value = names.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                texts[name] = text
        adds_bos = config.get("add_bos_token")
        return cls(
            texts=texts,
            added=_added_tokens(folder, config),
            chat_template=_chat_template(folder, config),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            legacy=config.get("legacy") is not False,
        )


def _added_tokens(folder: Path, config: Mapping[str, object]) -> tuple[AddedToken, ...]:
    """Read added_tokens_decoder, and added_tokens.json, its older form without flags."""
    found: dict[str, AddedToken] = {}
    for text, token_id in _optional_json(folder / "added_tokens.json").items():
        found[text] = AddedToken(id=_added_id(token_id, folder), text=text, special=False)
    entries = config.get("added_tokens_decoder")
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str):
            raise TokenizerError(f"{folder}: added_tokens_decoder holds {shown(key)}: no token")
        flags = {
            name: entry.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word")
        }
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key
        found[content] = AddedToken(id=_added_id(token_id, folder), text=content, **flags)
    return tuple(sorted(found.values(), key=lambda token: token.id))


def _added_id(value: object, folder: Path) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKENS:
        raise TokenizerError(f"{folder}: an added token has the id {shown(value)}")
    return value


def _chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return _read(file).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: is not UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def _from_library(
    library: tokenizers.Tokenizer, beside: _Beside, where: str
) -> VocabularyTokenizer:
    known = {token.text: token for token in added_tokens_of(library)}
    for token in beside.added:
        if known.get(token.text) == token:
            continue
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
        library.add_tokens(
            [tokenizers.AddedToken(token.text, special=token.special, normalized=False, **flags)]
        )
        if library.token_to_id(token.text) != token.id:
            raise TokenizerError(
                f"{where}: {shown(token.text)} is id {library.token_to_id(token.text)} there, "
                f"but id {token.id} in tokenizer_config.json"
            )
    for text in beside.texts.values():
        # A name for a text that the vocabulary lacks gives it no id: the model has no row for it.
        if text not in known and library.token_to_id(text) is not None:
            library.add_special_tokens(
                [tokenizers.AddedToken(text, special=True, normalized=False)]
            )
    texts = dict(beside.texts)
    front = library.encode("", add_special_tokens=True).tokens[:1]
    if "bos_token" not in texts and front:
        texts["bos_token"] = front[0]
    by_template = front == [texts.get("bos_token")]
    adds_bos = by_template if beside.adds_bos is None else beside.adds_bos
    eos = library.token_to_id(texts["eos_token"]) if "eos_token" in texts else None
    facts = TokenizerFacts(
        special_token_texts=texts,
        chat_template=beside.chat_template,
        adds_bos=adds_bos,
        eos_token_ids=() if eos is None else (eos,),
    )
    return fast_tokenizer(library, facts, where)


def _from_sentencepiece(content: bytes, beside: _Beside, where: str) -> VocabularyTokenizer:
    pieces = list(read_pieces(content, where))
    controls = {p.text: i for i, p in enumerate(pieces) if p.kind == PieceKind.CONTROL}
    texts = {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    texts = {name: text for name, text in texts.items() if text in controls} | dict(beside.texts)
    ids = controls | {token.text: token.id for token in beside.added}
    eos = ids.get(texts.get("eos_token", ""))
    facts = TokenizerFacts(
        special_token_texts=texts,
        chat_template=beside.chat_template,
        adds_bos=beside.adds_bos is not False,
        eos_token_ids=() if eos is None else (eos,),
    )
    return sentencepiece_tokenizer(
        content, facts, added=beside.added, prefixes_always=beside.legacy, where=where
    )


def _through_transformers(folder: Path) -> VocabularyTokenizer:
    """Let transformers convert what is neither of ours; a second to import, so only here."""
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "vocab.json")):
        raise TokenizerError(f"{folder}: has no tokenizer.json and no tokenizer.model")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise TokenizerError(f"{folder}: has no tokenizer that can be read: {reason}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(f"{folder}: has no tokenizer.json and no tokenizer.model")
    return _from_library(backend, _Beside.read(folder), str(folder))


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError(f"{path}: is larger than any tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
