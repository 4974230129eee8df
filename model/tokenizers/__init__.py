"""Tokenizers of every form a checkpoint carries, behind `model.tokenizer.Tokenizer`.

`load_tokenizer` is the way in. Knows files, vocabularies and exact bytes; nothing of networks,
chat templates' meaning, requests or HTTP.
"""

from model.tokenizers.load import load_tokenizer, tokenizer_from_gguf_fields

__all__ = ["load_tokenizer", "tokenizer_from_gguf_fields"]
