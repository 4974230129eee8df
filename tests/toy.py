"""Toy Llama checkpoints in every form that we load: Hugging Face, GGUF and Meta's own.

All three writers start from one set of weights (`toy_state`), so that a checkpoint written twice
in different forms is the same model. Weights are scaled so that greedy decoding is a fair test:
projections have unit gain, the head gives logits a standard deviation near 3 (a typical gap of
0.5 to 1 between the best two of 320 ids, far above rounding), queries and keys are strong enough
that attention is peaked and a wrong rotary embedding shows, and what the layers add outweighs the
embedding, so that a tied model does not repeat its input.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Config = dict[str, Any]

SPECIAL_TOKENS = ("<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS_ID, BOS_ID, IM_START_ID, IM_END_ID, PAD_ID = range(len(SPECIAL_TOKENS))
PLAIN_ADDED_TOKEN = "<think>"  # added, not special: survives skip_special_tokens
VOCAB_SIZE = 320  # the specials, 256 bytes, merges, and the plain added token last

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Overrides of `toy_config`, one for each thing that can differ between two Llamas.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, Config] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mha-absent": {"num_key_value_heads": None},
    "mqa": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 32},
    "narrow-heads": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "all-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "theta-500000": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear-v5": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic-v5": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    },
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama3-v5": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}},
    "yarn": {"rope_scaling": {"type": "yarn", **YARN_ROPE}},
    "yarn-v5": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN_ROPE}},
    "yarn-mscale": {
        "rope_scaling": {"rope_type": "yarn", **YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.8}
    },
}

GGUF_VARIANTS = tuple(name for name in VARIANTS if "dynamic" not in name and "mscale" not in name)
META_VARIANTS = ("gqa", "mha-absent", "mqa", "theta-500000")


def toy_config(**overrides: Any) -> Config:
    """Build a config.json; an override of None removes the field."""
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }
    if "rope_parameters" in overrides:
        del config["rope_theta"]  # the newer form carries it inside
    config.update(overrides)
    return {key: value for key, value in config.items() if value is not None}


def head_dim_of(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def kv_heads_of(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def toy_state(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw float32 weights under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * head_dim_of(config)
    kv_size = kv_heads_of(config) * head_dim_of(config)

    def draw(*shape: int, gain: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (gain / math.sqrt(shape[-1]))

    def norm() -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(hidden, generator=generator)

    state = {"model.embed_tokens.weight": draw(config["vocab_size"], hidden, gain=3.0)}
    linears = {  # name: (out, in, gain, biased)
        "self_attn.q_proj": (q_size, hidden, 1.5, config["attention_bias"]),
        "self_attn.k_proj": (kv_size, hidden, 1.5, config["attention_bias"]),
        "self_attn.v_proj": (kv_size, hidden, 1.5, config["attention_bias"]),
        "self_attn.o_proj": (hidden, q_size, 1.5, config["attention_bias"]),
        "mlp.gate_proj": (ffn, hidden, 1.5, config["mlp_bias"]),
        "mlp.up_proj": (ffn, hidden, 1.5, config["mlp_bias"]),
        "mlp.down_proj": (hidden, ffn, 1.5, config["mlp_bias"]),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, gain, biased) in linears.items():
            state[f"{prefix}{name}.weight"] = draw(rows, columns, gain=gain)
            if biased:
                state[f"{prefix}{name}.bias"] = 0.3 * torch.randn(rows, generator=generator)
        state[f"{prefix}input_layernorm.weight"] = norm()
        state[f"{prefix}post_attention_layernorm.weight"] = norm()
    state["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = draw(config["vocab_size"], hidden, gain=3.0)
    return state


def toy_tokenizer() -> Tokenizer:
    """Build a byte-level BPE of 320 ids: GPT-2's pre-tokenizer, BOS put in front, some specials."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = (
        "the muleteer drives a train of pack llamas over the mountain and sings to them",
        "then she rests in the shade of the stone wall where the others are waiting",
        "once upon a time there was a little llama that wanted to read and write",
        "what is the answer? there are 10 llamas, 20 mules and 3 stations on the road",
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(PLAIN_ADDED_TOKEN, special=False, normalized=False)])
    bos = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
            ),
        ]
    )
    return tokenizer


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_toy_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[BOS_ID],
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "pad_token": SPECIAL_TOKENS[PAD_ID],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_toy_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a Hugging Face folder and return it.

    The ends of text in its files are `<|end|>` alone: that of the chat template, `<|im_end|>`,
    is left to be found, as with many real instruct models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config_overrides.setdefault("torch_dtype", str(dtype).removeprefix("torch."))
    config = toy_config(**config_overrides)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    state = {name: tensor.to(dtype) for name, tensor in toy_state(config, seed).items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(state)
        weight_map = {}
        for shard in range(shards):
            filename = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: state[name] for name in names[shard::shards]}
            save_file(part, folder / filename, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, filename))
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    if tokenizer:
        write_toy_tokenizer(folder)
    return folder


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection (or bias) from halves to neighbouring pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_freq_factors(config: Config) -> np.ndarray:
    """What llama.cpp's converter stores in `rope_freqs.weight` for Llama 3.1's scaling."""
    rope = config.get("rope_parameters") or config["rope_scaling"]
    dim, theta = head_dim_of(config), rope.get("rope_theta", config.get("rope_theta"))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def random_blocks(shape: tuple[int, ...], qtype: Any, generator: np.random.Generator) -> np.ndarray:
    """Draw valid blocks of a type that gguf-py cannot quantise: random codes, small scales."""
    import gguf

    block_len, type_size = gguf.GGML_QUANT_SIZES[qtype]
    scales_at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[qtype.name]
    blocks = generator.integers(0, 256, (math.prod(shape) // block_len, type_size), dtype=np.uint8)
    if qtype.name == "Q6_K":  # signed scales and codes: a weight is d * scale * code
        blocks[:, 192:208] = generator.integers(-64, 64, (len(blocks), 16)).astype(np.uint8)
    for at in scales_at:
        step = generator.uniform(1e-4, 3e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = step.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], shape[-1] // block_len * type_size)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Translate a Hugging Face tensor name into llama.cpp's."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def write_toy_gguf(
    folder: Path,
    *,
    seed: int = 0,
    quant: str = "F32",
    tokenizer: bool = True,
    fields: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write `toy.gguf` as llama.cpp's converter would, and return the file.

    Matrices are stored as `quant`, vectors as F32. Rows must be a multiple of the type's block:
    256 for the K-quants (hidden_size=256, intermediate_size=512), whose weights are random
    blocks, since gguf-py cannot quantise to them. `fields` are extra string, int or float fields.
    """
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    config = toy_config(**config_overrides)
    path = folder / "toy.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _add_gguf_config(writer, config)
    if tokenizer:
        _add_gguf_tokenizer(writer)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    generator = np.random.default_rng(seed)
    qtype = gguf.GGMLQuantizationType[quant]
    for name, tensor in toy_state(config, seed).items():
        if ".q_proj." in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = interleave(tensor, kv_heads_of(config))
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.numpy())
        elif quant in ("Q4_K", "Q5_K", "Q6_K"):
            blocks = random_blocks(tuple(tensor.shape), qtype, generator)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=qtype)
        else:
            array = gguf.quants.quantize(tensor.contiguous().numpy(), qtype)
            writer.add_tensor(gguf_name(name), array, raw_dtype=qtype)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_freq_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_config(writer: Any, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads_of(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim_of(config))
    if "head_dim" in config:
        writer.add_key_length(head_dim_of(config))
        writer.add_value_length(head_dim_of(config))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "yarn"):
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_gguf_tokenizer(writer: Any) -> None:
    serialised = json.loads(toy_tokenizer().to_str())
    vocab = dict(serialised["model"]["vocab"])
    types = dict.fromkeys(vocab, 1)  # normal
    for added in serialised["added_tokens"]:
        vocab[added["content"]] = added["id"]
        types[added["content"]] = 3 if added["special"] else 4  # control, user defined
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([types[token] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in serialised["model"]["merges"]])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
META_VOCAB_SIZE = VOCAB_SIZE - len(SPECIAL_TOKENS) - 1 + 256  # ranks, then 256 special tokens


def meta_name(name: str) -> str:
    """Translate a Hugging Face tensor name into Meta's."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{META_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"layers.{layer}.{META_NAMES[part]}.{kind}"


def write_toy_meta(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write Meta's folder: params.json, consolidated.NN.pth, tokenizer.model (tiktoken ranks).

    Overrides are config.json's fields; heads must be hidden_size / num_attention_heads wide, and
    nothing biased or tied. intermediate_size follows from Meta's rule (multiple_of 32: 192).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = toy_config(**{"vocab_size": META_VOCAB_SIZE, **config_overrides})
    hidden = config["hidden_size"]
    config["intermediate_size"] = -(-(8 * hidden // 3) // 32) * 32
    params = {
        "dim": hidden,
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "multiple_of": 32,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "vocab_size": -1,
    }
    if "num_key_value_heads" in config:
        params["n_kv_heads"] = config["num_key_value_heads"]
    write_json(folder / "params.json", params)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in toy_state(config, seed).items():
        if ".q_proj." in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = interleave(tensor, kv_heads_of(config))
        split_columns = any(part in name for part in ("o_proj", "down_proj", "embed_tokens"))
        for shard, part in enumerate(parts):
            if tensor.dim() == 1:
                piece = tensor
            else:
                piece = tensor.chunk(shards, dim=1 if split_columns else 0)[shard]
            part[meta_name(name)] = piece.to(dtype).clone()
    for shard, part in enumerate(parts):
        part["rope.freqs"] = torch.ones(head_dim_of(config) // 2)
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tiktoken_ranks())
    return folder


def tiktoken_ranks() -> bytes:
    """The toy BPE as lines of base64 bytes and rank, the form of Llama 3's tokenizer.model."""
    vocab = json.loads(toy_tokenizer().to_str())["model"]["vocab"]
    alphabet = _byte_of_character()
    pieces = [text for text in sorted(vocab, key=vocab.__getitem__) if text not in SPECIAL_TOKENS]
    lines = []
    for rank, text in enumerate(pieces):
        raw = bytes(alphabet[character] for character in text)
        lines.append(f"{base64.b64encode(raw).decode()} {rank}\n")
    return "".join(lines).encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + at): byte for at, byte in enumerate(hidden)}
