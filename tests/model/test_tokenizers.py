"""Tokenizers of every form: their references' ids, exact bytes, BOS once, plain text plain."""

import base64
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from model.errors import ModelError, TokenizerError
from model.tokenizer import UnencodableText
from model.tokenizers import load_tokenizer, tokenizer_from_gguf_fields
from model.tokenizers.fast import LLAMA3_SPLIT
from tests.text.builders import CHATML, CHATML_TOKENS, byte_level_folder, metaspace_folder
from tests.toy import write_toy_checkpoint, write_toy_gguf

TEXTS = [
    "",
    "Once upon a time, there was a little girl",
    "a  b   c\n\n\td",
    "é 你好 🙂 \u200d\u202e e\u0301\u0301",
    "123 4567 it's I'LL",
    "null\0byte",
    "<0x41><unk",
    "trailing ",
    "\n",
    "\ufeffbom",
]
UNICODE = st.text(max_size=40)


@pytest.fixture(scope="module")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = [
        AddedToken("<think>", special=False, normalized=False),
        AddedToken("<L>", special=False, normalized=False, lstrip=True),
        AddedToken("<R>", special=False, normalized=False, rstrip=True),
        AddedToken("word", special=False, normalized=False, single_word=True),
        AddedToken("<L><R>", special=True, normalized=False),
    ]
    folder = tmp_path_factory.mktemp("bytelevel")
    return byte_level_folder(folder, CHATML_TOKENS, CHATML, plain_added=plain, eos="<|im_end|>")


def joined(tokenizer: Any, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


@given(text=UNICODE)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_byte_level_ids_give_back_the_exact_text(bytelevel: Path, text: str) -> None:
    tokenizer = load_tokenizer(bytelevel)
    for parse in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse)
        if parse is False or "<" not in text:  # a token may swallow the space beside it
            assert joined(tokenizer, ids) == text.encode()


def test_decoding_is_transformers_own(bytelevel: Path, stories260k: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for folder, offset in ((bytelevel, 0), (stories260k, 1)):
        reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            ours = joined(tokenizer, ids).decode(errors="replace")
            # sentencepiece's decoder drops the space that its encoder put in front.
            assert ours.removeprefix(" " * offset) == reference.decode(ids), text


def test_two_forms_of_one_vocabulary_give_the_same_ids(stories260k: Path) -> None:
    one = load_tokenizer(stories260k / "tokenizer.json")
    other = load_tokenizer(stories260k / "tokenizer.model")
    assert [one.token_bytes(i) for i in range(512)] == [other.token_bytes(i) for i in range(512)]
    for text in TEXTS + [line * 3 for line in TEXTS]:
        if text[:1] in (" ", "▁"):
            continue  # tokenizers puts no space before a space, sentencepiece does
        for parse in (True, False):
            ids = one.encode(text, add_special_tokens=True, parse_special=parse)
            assert ids == other.encode(text, add_special_tokens=True, parse_special=parse), text


@given(text=UNICODE)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_sentencepiece_ids_are_the_librarys(stories260k: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(stories260k / "tokenizer.model"))
    tokenizer = load_tokenizer(stories260k / "tokenizer.model")
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == reference.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_bos_stands_in_front_exactly_once(stories260k: Path, name: str) -> None:
    tokenizer = load_tokenizer(stories260k / name)
    assert tokenizer.encode("hi", add_special_tokens=True).count(1) == 1
    assert tokenizer.encode("<s>hi", add_special_tokens=True).count(1) == 1
    assert tokenizer.encode("<s>hi", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("hi", add_special_tokens=False).count(1) == 0
    assert tokenizer.encode("<s>hi", add_special_tokens=True, parse_special=False).count(1) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_no_bos_where_the_config_says_so(stories260k: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((stories260k / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "bos_token": "<s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hi", add_special_tokens=True)[0] != 1
    assert tokenizer.bos_token_id == 1


def test_added_tokens_are_text_when_not_parsed(bytelevel: Path, stories260k: Path) -> None:
    for path in (bytelevel, stories260k, stories260k / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        for text, token_id in tokenizer.added_tokens.items():
            ids = tokenizer.encode(f"a{text}b {text}", add_special_tokens=False)
            assert text == "word" or ids.count(token_id) == 2
            ids = tokenizer.encode(
                f"a{text}b {text}", add_special_tokens=False, parse_special=False
            )
            assert token_id not in ids
            assert joined(tokenizer, ids).endswith(f"a{text}b {text}".encode())


PARTS = st.lists(
    st.sampled_from(
        [
            "<L>",
            "<R>",
            "word",
            "<L><R>",
            "<|im_end|>",
            "<think>",
            "<|im_",
            "end|>",
            " ",
            "\n",
            "x",
            "the llama",
            "é",
        ]
    ),
    max_size=8,
).map("".join)


@given(text=PARTS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_protected_word_changes_no_ids_around_it(bytelevel: Path, text: str) -> None:
    tokenizer = load_tokenizer(bytelevel)
    whole = tokenizer.encode(text + ".", add_special_tokens=False)
    assert tokenizer.encode_segments([(text, True), (".", False)]) == whole


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_protected_word_changes_no_space_before_words(
    stories260k: Path, tmp_path: Path, scheme: str
) -> None:
    tokenizer = load_tokenizer(metaspace_folder(tmp_path, stories260k, CHATML, scheme=scheme))
    for text in ("one two", "<s>one</s>two <s> three", "</s></s>\none", "one</s>"):
        for cut in range(len(text)):
            if any(mark in text[max(0, cut - 3) : cut + 4] for mark in "<>"):
                continue
            pieces = [(text[:cut], True), (text[cut], False), (text[cut + 1 :], True)]
            whole = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.encode_segments(pieces) == whole, (text, cut)


def test_a_token_that_touches_a_protected_piece_is_text(bytelevel: Path) -> None:
    tokenizer = load_tokenizer(bytelevel)
    end = tokenizer.added_tokens["<|im_end|>"]
    assert end not in tokenizer.encode_segments([("<|im", True), ("_end|>", False)])
    assert end not in tokenizer.encode_segments([("<|im", False), ("_end|>", True)])
    assert end not in tokenizer.encode_segments([("<|im", True), ("", False), ("_end|>", True)])
    assert tokenizer.encode_segments([("<|im", True), ("_end|>", True)]) == [end]


def test_special_texts_in_the_vocabulary_are_not_reached_by_merges(tmp_path: Path) -> None:
    letters = {letter: place for place, letter in enumerate("<s>/ab")}
    vocab = letters | {"<s": 6, "<s>": 7}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 7, "content": "<s>", "special": True}],
        "decoder": {"type": "ByteFallback"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["<", "s"], ["<s", ">"]],
            "ignore_merges": True,
        },
    }
    spec["added_tokens"][0] |= dict.fromkeys(  # type: ignore[index]
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<s>", add_special_tokens=False) == [7]
    assert tokenizer.encode("<s>", add_special_tokens=False, parse_special=False) == [6, 2]


def test_threads_may_share_the_first_plain_encoding(bytelevel: Path) -> None:
    tokenizer = load_tokenizer(bytelevel)

    def encode(_: int) -> list[int]:
        return tokenizer.encode("<|im_end|> llama", add_special_tokens=False, parse_special=False)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(encode, range(64)))
    assert all(ids == results[0] for ids in results)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "é\ud83d"])
def test_half_a_surrogate_pair_is_a_clear_error(stories260k: Path, name: str, text: str) -> None:
    tokenizer = load_tokenizer(stories260k / name)
    with pytest.raises(UnencodableText, match="surrogate"):
        tokenizer.encode(text, add_special_tokens=True)


def test_a_million_combining_marks_are_encoded(bytelevel: Path) -> None:
    tokenizer = load_tokenizer(bytelevel)
    text = "e" + "\u0301" * 100_000 + "\0"
    assert joined(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text.encode()


def test_ids_without_a_meaning_have_no_bytes(bytelevel: Path) -> None:
    tokenizer = load_tokenizer(bytelevel)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""


def ranks_file(folder: Path) -> tuple[Path, dict[bytes, int]]:
    """Write a small tiktoken file: the bytes, then some merges, as a tokenizer.model."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in (" the", " llama", "ing", "hello", "\n\n", "é", "100", "aaaa", "don't"):
        raw = word.encode()
        for end in range(2, len(raw) + 1):
            ranks.setdefault(raw[:end], len(ranks))
    path = folder / "tokenizer.model"
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    return path, ranks


@given(text=st.one_of(UNICODE, st.text(alphabet="the llamingo\né1a'", max_size=40)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ranks_give_tiktokens_ids(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path, ranks = ranks_file(tmp_path_factory.getbasetemp())
    reference = tiktoken.Encoding(
        "toy", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == reference.encode(text, disallowed_special=())
    assert joined(tokenizer, ids) == text.encode()


def test_ranks_bring_llama_3s_special_tokens(tmp_path: Path) -> None:
    path, ranks = ranks_file(tmp_path)
    tokenizer = load_tokenizer(path, expected_vocab_size=len(ranks) + 256)
    names = {text: token_id - len(ranks) for text, token_id in tokenizer.added_tokens.items()}
    assert len(names) == 256
    assert names["<|begin_of_text|>"] == 0
    assert names["<|end_of_text|>"] == 1
    assert names["<|start_header_id|>"] == 6
    assert names["<|eot_id|>"] == 9
    assert {i - len(ranks) for i in tokenizer.eos_token_ids} == {1, 8, 9}
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=True) == [len(ranks), len(ranks) + 9]


def test_a_vocabulary_larger_than_the_embedding_is_refused(bytelevel: Path) -> None:
    size = load_tokenizer(bytelevel).vocab_size
    assert load_tokenizer(bytelevel, expected_vocab_size=size).vocab_size == size
    with pytest.raises(TokenizerError, match=f"ids up to {size - 1}"):
        load_tokenizer(bytelevel, expected_vocab_size=size - 1)


def test_loading_imports_no_transformers_and_no_torch(bytelevel: Path, stories260k: Path) -> None:
    paths = [str(bytelevel), str(stories260k), str(stories260k / "tokenizer.model")]
    code = (
        "import sys; from pathlib import Path; from model.tokenizers import load_tokenizer\n"
        f"for path in {paths!r}: load_tokenizer(Path(path))\n"
        "print({'transformers', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_gguf_has_the_ids_of_the_folder_it_was_made_from(tmp_path: Path) -> None:
    folder = load_tokenizer(write_toy_checkpoint(tmp_path / "hf"))
    gguf = load_tokenizer(write_toy_gguf(tmp_path / "gguf"))
    assert gguf.added_tokens == folder.added_tokens
    assert gguf.eos_token_ids == folder.eos_token_ids
    assert gguf.chat_template == folder.chat_template
    for text in [*TEXTS, "<|im_start|>user<think>", "the llamas"]:
        for parse in (True, False):
            ids = gguf.encode(text, add_special_tokens=True, parse_special=parse)
            assert ids == folder.encode(text, add_special_tokens=True, parse_special=parse)


def spm_fields(folder: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes for a sentencepiece model."""
    source = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = range(source.vocab_size())
    kinds = [
        2 if source.is_unknown(i) else 3 if source.is_control(i) else 6 if source.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [source.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [source.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@given(text=UNICODE)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_ggufs_sentencepiece_form_gives_the_models_ids(stories260k: Path, text: str) -> None:
    ours = tokenizer_from_gguf_fields(spm_fields(stories260k), "toy.gguf")
    other = load_tokenizer(stories260k / "tokenizer.model")
    assert ours.encode(text, add_special_tokens=True) == other.encode(text, add_special_tokens=True)


def test_ggufs_flags_of_bos_and_space_are_kept(stories260k: Path) -> None:
    fields = spm_fields(stories260k)
    fields |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    tokenizer = tokenizer_from_gguf_fields(fields, "toy.gguf")
    assert joined(tokenizer, tokenizer.encode("hi", add_special_tokens=True)) == b"hi"


def bpe_fields(**changes: Any) -> dict[str, Any]:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "<|end|>", "<think>"]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 2) + [3, 4],
        "merges": ["1 2", "12 3"],
    } | changes
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", [b"123", b"4"]),
        ("smollm", [b"1", b"2", b"3", b"4"]),
        ("llama-bpe", [b"123", b"4"]),
        ("tekken", [b"1", b"2", b"3", b"4"]),
    ],
)
def test_digits_are_parted_as_the_pre_tokenizer_says(pre: str, words: list[bytes]) -> None:
    tokenizer = tokenizer_from_gguf_fields(bpe_fields(pre=pre), "toy.gguf")
    ids = tokenizer.encode("1234", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == words


def test_ggufs_token_types_say_what_is_special() -> None:
    tokenizer = tokenizer_from_gguf_fields(bpe_fields(), "toy.gguf")
    added = tokenizer.added_tokens
    assert set(added) == {"<|end|>", "<think>"}
    assert tokenizer.is_special(added["<|end|>"])
    assert not tokenizer.is_special(added["<think>"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model is 'bert'"),
        ({"pre": "gibberish"}, "pre is 'gibberish'"),
        ({"tokens": "x"}, "tokens is missing or not a list"),
        ({"tokens": ["a", "a"], "token_type": None}, "a token twice"),
        ({"token_type": [1]}, "a type for each token"),
        ({"token_type": [9] * 260}, "token_type"),
        ({"merges": ["ab"]}, "not a pair"),
        ({"merges": ["1 zz"]}, "cannot be built"),
        ({"bos_token_id": 10_000}, "not an id of the vocabulary"),
        ({"add_bos_token": "yes"}, "must be true or false"),
    ],
)
def test_a_broken_gguf_tokenizer_is_refused_in_one_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        tokenizer_from_gguf_fields(bpe_fields(**changes), "toy.gguf")
    assert str(caught.value).startswith("toy.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[1"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model at all"),
        ("tokenizer.model", b"AA== 0\nnonsense\n"),
        ("tokenizer.model", b"AA== 5\n"),
        ("tokenizer.gguf", b"GGUF"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_sentencepiece_model_is_refused(
    stories260k: Path, tmp_path: Path, share: float
) -> None:
    content = (stories260k / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TokenizerError):
        load_tokenizer(path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_chat_template_file_goes_before_the_config(bytelevel: Path, tmp_path: Path) -> None:
    for file in bytelevel.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


def test_the_default_of_several_templates_is_taken(bytelevel: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bytelevel / "tokenizer.json").read_bytes())
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "d"


def test_an_added_token_with_another_id_in_the_config_is_refused(
    bytelevel: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bytelevel / "tokenizer.json").read_bytes())
    config = {"added_tokens_decoder": {"7": {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="but id 7"):
        load_tokenizer(tmp_path)


def test_added_tokens_beside_a_sentencepiece_model_count(stories260k: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((stories260k / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 512}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("hi<|im_end|>", add_special_tokens=False)
    assert ids[-1] == 512
    assert tokenizer.token_bytes(512) == b"<|im_end|>"
    assert tokenizer.vocab_size == 513


def test_an_added_token_with_an_absurd_id_is_refused(stories260k: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((stories260k / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"x": 999999999999}')
    with pytest.raises(TokenizerError, match="has the id 999999999999"):
        load_tokenizer(tmp_path)


def test_a_folder_of_vocabulary_and_merges_goes_through_transformers(tmp_path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "<|endoftext|>"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("he said", add_special_tokens=False)
    assert ids[0] == vocab["he"]
    assert joined(tokenizer, ids) == b"he said"
