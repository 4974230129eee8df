"""Llama 3's tokenizer.model as Meta ships it: tiktoken's ranks, one token in base64 a line.

The special tokens are not in that file; they are those of Meta's code for Llama 3.1 and later,
whose ids agree with Llama 3's for every token that Llama 3 uses.
"""

import base64
import binascii
import re

from model.errors import TokenizerError
from model.tokenizers.fast import (
    LLAMA3_SPLIT,
    byte_level_tokenizer,
    fast_tokenizer,
    split_then_byte_level,
)
from model.tokenizers.vocabulary import AddedToken, TokenizerFacts, VocabularyTokenizer

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?")
_NUM_SPECIAL = 256
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def looks_like_ranks(content: bytes) -> bool:
    """Say whether a tokenizer.model holds ranks rather than a sentencepiece model."""
    return _LINE.fullmatch(content[:1000].partition(b"\n")[0]) is not None


def tokenizer_from_ranks(
    content: bytes, chat_template: str | None, where: str
) -> VocabularyTokenizer:
    """Build Llama 3's tokenizer from its ranks. Raises TokenizerError."""
    ranks = _parse(content, where)
    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    # A pair merges when what it makes is a token, the one of the lowest rank first: listed for
    # every way to part a token, merges by pair are the same as tiktoken's merges by result.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    reserved = (f"<|reserved_special_token_{place}|>" for place in range(3, _NUM_SPECIAL))
    names = [*_NAMED, *reserved][:_NUM_SPECIAL]
    added = [
        AddedToken(id=len(vocab) + place, text=name, special=True)
        for place, name in enumerate(names)
    ]
    library = byte_level_tokenizer(
        vocab=vocab,
        merges=merges,
        pre_tokenizer=split_then_byte_level(LLAMA3_SPLIT),
        added=added,
        ignore_merges=True,
        where=where,
    )
    facts = TokenizerFacts(
        special_token_texts={"bos_token": _NAMED[0], "eos_token": _NAMED[1]},
        chat_template=chat_template,
        adds_bos=True,
        eos_token_ids=tuple(token.id for token in added if token.text in _ENDS),
    )
    return fast_tokenizer(library, facts, where)


def _parse(content: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError("no token and rank")
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{where}: line {number} is not a token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{where}: the ranks are not 0, 1, 2, … up to their number")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{where}: a byte has no token of its own")
    return ranks


def _byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte."""
    visible = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
