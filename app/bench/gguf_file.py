"""Writes a checkpoint of `shapes` as a GGUF file, its matrices quantised by the `gguf` package.

Every matrix is quantised, the head too, which llama.cpp's own tool would keep at 6 bits for
Q4_0: the file is a little smaller, and so faster, than users have it.
"""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from app.bench.shapes import VOCAB_SIZE, Shape, read_tensors, words

_BYTE, _CONTROL, _NORMAL, _UNKNOWN = 6, 3, 1, 2  # llama.cpp's kinds of tokens
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(shape: Shape, checkpoint: Path, file: Path, scheme: str) -> Path:
    """Write the file unless it is there. `scheme` is "Q8_0" or "Q4_0"."""
    if file.exists():
        return file
    draft = file.with_name(file.name + ".part")
    writer = gguf.GGUFWriter(draft, "llama")
    _add_shape(writer, shape, scheme)
    _add_vocabulary(writer)
    kind = gguf.GGMLQuantizationType[scheme]
    for name, values in read_tensors(checkpoint / "model.safetensors"):
        if values.ndim == 1:
            writer.add_tensor(tensor_name(name), values)
            continue
        rows = values
        if ".q_proj." in name:
            rows = interleaved(values, shape.num_heads)
        if ".k_proj." in name:
            rows = interleaved(values, shape.num_kv_heads)
        writer.add_tensor(tensor_name(name), gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return draft.rename(file)


def tensor_name(name: str) -> str:
    """Return GGUF's name of a tensor of Hugging Face's form."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def interleaved(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Reorder a head's rows from rotating halves to llama.cpp's rotating neighbours."""
    rows, width = values.shape
    halves = values.reshape(num_heads, 2, rows // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, width))


def _add_shape(writer: gguf.GGUFWriter, shape: Shape, scheme: str) -> None:
    writer.add_name(shape.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{scheme}"])
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """As SentencePiece has it: the same ids and texts as the checkpoint's tokenizer."""
    texts = [word.replace(" ", "▁") for word in words()]
    texts[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * VOCAB_SIZE)
    writer.add_token_types(kinds + [_NORMAL] * (VOCAB_SIZE - len(kinds)))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
