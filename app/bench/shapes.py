"""Llama checkpoints with random weights, in Hugging Face's form, bfloat16.

Speed does not ask what a model says, only how large it is. The vocabulary is one word an id
(" t300" is 300), so that ids and texts map one to one for servers that take text alone.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 32_000
FIRST_WORD_ID = 300  # below: <unk>, <s>, </s>, then the 256 bytes, then a margin
_STEP = 0.02  # standard deviation of a weight, as Llama was initialised


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a Llama whose vocabulary is 32,000 and whose head is untied."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="S", hidden_size=288, num_layers=6, num_heads=6, num_kv_heads=6,
              intermediate_size=768),
        Shape(name="M", hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12,
              intermediate_size=2048),
        Shape(name="L", hidden_size=2048, num_layers=22, num_heads=32, num_kv_heads=4,
              intermediate_size=5632),
    )
}  # fmt: skip


def words() -> list[str]:
    """Return the text of each id: three special tokens, the 256 bytes, then a word each."""
    return ["<unk>", "<s>", "</s>", *(chr(byte) for byte in range(256))] + [
        f" t{index}" for index in range(259, VOCAB_SIZE)
    ]


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a checkpoint by name, in the order that files hold them."""
    width, inner = shape.hidden_size, shape.intermediate_size
    kv_size = shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, width)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (width, width),
            prefix + "self_attn.k_proj.weight": (kv_size, width),
            prefix + "self_attn.v_proj.weight": (kv_size, width),
            prefix + "self_attn.o_proj.weight": (width, width),
            prefix + "post_attention_layernorm.weight": (width,),
            prefix + "mlp.gate_proj.weight": (inner, width),
            prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (VOCAB_SIZE, width)}


def write_checkpoint(shape: Shape, folder: Path) -> Path:
    """Write the checkpoint unless it is there; returns its folder."""
    if folder.is_dir():
        return folder
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    _write_json(draft / "config.json", _config(shape))
    _write_json(draft / "generation_config.json", {"do_sample": False})
    _write_json(draft / "tokenizer.json", _tokenizer())
    _write_json(draft / "tokenizer_config.json", _tokenizer_config())
    _write_weights(shape, draft / "model.safetensors")
    draft.rename(folder)
    return folder


def read_tensors(file: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the tensors of a bfloat16 safetensors file as float32, one at a time."""
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    data = np.memmap(file, np.uint8, "r", offset=8 + header_size)
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            halves = data[begin:end].view(np.uint16).astype(np.uint32)
            yield name, (halves << 16).view(np.float32).reshape(entry["shape"])


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), "utf-8")


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, object]:
    """A byte-level BPE that merges nothing: each word is a token as it stands."""
    letters = byte_letters()
    texts = words()
    pieces = [
        *texts[:3],
        *letters,
        *("".join(letters[byte] for byte in text.encode()) for text in texts[259:]),
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    one_word = {"type": "Split", "pattern": {"Regex": r"\s?\S+"}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": texts[index], "special": True} | flags for index in range(3)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [one_word | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [],
            "ignore_merges": True,
            "byte_fallback": False,
            "fuse_unk": False,
            "unk_token": None,
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
        },
    }


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }


def _write_weights(shape: Shape, file: Path) -> None:
    header, offset = {}, 0
    for name, dims in tensor_shapes(shape).items():
        end = offset + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for dims in tensor_shapes(shape).values():
            values = np.ones(dims, np.float32)
            if len(dims) == 2:
                values = rng.standard_normal(dims, np.float32) * np.float32(_STEP)
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).data)
