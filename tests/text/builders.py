"""Small tokenizers and chat templates in the forms that instruct Llamas have."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from model.tokenizer import Tokenizer
from model.tokenizers import load_tokenizer

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
ZEPHYR_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content']"
    " + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{{ tool | tojson(ensure_ascii=true, indent=2) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message.name %}{{ ' name=' + message.name }}{% endif %}{{ '\n' }}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name ~ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)

CORPUS = (
    "the muleteer drives a train of pack llamas over the mountain and sings to them",
    "system user assistant name tool what is the answer? there are 10 llamas",
    "once upon a time there was a little llama that wanted to read and write",
)


def byte_level_folder(
    folder: Path,
    special: Sequence[str],
    template: str,
    *,
    plain_added: Sequence[AddedToken] = (),
    bos: str | None = None,
    eos: str | None = None,
) -> Path:
    """Write a Hugging Face tokenizer folder with a small byte-level BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(plain_added))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    config |= {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def metaspace_folder(
    folder: Path, source: Path, template: str, special: Sequence[str] = (), scheme: str = "always"
) -> Path:
    """Write stories260K's tokenizer.json with another template, more specials and a scheme."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["prepend_scheme"] = scheme
    known = {token["content"] for token in spec["added_tokens"]}
    for text in special:
        if text not in known:
            added = dict(spec["added_tokens"][0])
            token_id = 509 + len(spec["added_tokens"])
            spec["added_tokens"].append(added | {"id": token_id, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat_folders(root: Path, stories: Path | None) -> dict[str, Path]:
    """Write one folder a template."""
    folders = {
        "chatml": byte_level_folder(
            root / "chatml", CHATML_TOKENS, CHATML, bos="<|im_start|>", eos="<|im_end|>"
        ),
        "llama3": byte_level_folder(
            root / "llama3", LLAMA3_TOKENS, LLAMA3, bos=LLAMA3_TOKENS[0], eos=LLAMA3_TOKENS[1]
        ),
        "tools": byte_level_folder(root / "tools", CHATML_TOKENS, TOOLS, eos="<|im_end|>"),
    }
    if stories is not None:
        folders["llama2"] = metaspace_folder(root / "llama2", stories, LLAMA2)
        folders["llama2-first"] = metaspace_folder(
            root / "llama2-first", stories, LLAMA2, scheme="first"
        )
        folders["zephyr"] = metaspace_folder(root / "zephyr", stories, ZEPHYR, ZEPHYR_TOKENS)
    return folders


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def decoded(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode(errors="replace")
