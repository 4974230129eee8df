"""FP8 checkpoints: matrices as e4m3 codes, with their scales beside them in safetensors files.

Read are compressed-tensors (float-quantized), "fp8" (AutoFP8's and transformers'), "fbgemm_fp8" and
"modelopt" (FP8): a scale for the tensor, for each output, or for blocks of it. The last is no form
that a product takes here, so such matrices are quantised anew, with a scale for each output. Which
matrices are in fp8 their headers say; what a config lists as ignored is stored in 16 bits, and
stays so. Activations get scales of their own, token by token; static ones in a file are not used.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig, shown
from model.errors import WeightsError
from model.fp8 import Fp8Rows
from model.weights.fields import Fields
from model.weights.safetensors import FP8, SafetensorsStore
from model.weights.tensors import PackedTensor, TensorInfo, required_tensors

logger = logging.getLogger(__name__)

Block = tuple[int, int]
"""Rows and columns that share a scale."""

FP8_CODES = "float8_e4m3fn"  # `TensorInfo.dtype` of a matrix that has its scales
_SCALES = ("weight_scale", "weight_scale_inv")  # of either a weight is code * scale
_STATIC = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")
_KV_SCALES = {  # what tools call the scale of a layer's keys, and of its values
    "k": ("self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.k_proj.output_scale"),
    "v": ("self_attn.v_scale", "self_attn.v_proj.v_scale", "self_attn.v_proj.output_scale"),
}
_SHARED_KV_SCALE = "self_attn.kv_scale"


def check_quantization(values: Mapping[str, object], where: str) -> Block | None:
    """Read the quantization_config of a config.json; return the block whose weights share a scale.

    None means a scale for a tensor or an output, or that nothing is quantised. Raises ConfigError
    for any scheme but weights in e4m3.
    """
    fields = Fields(values, where)
    quantization = fields.inner("quantization_config")
    if quantization is None:
        return None
    match method := quantization.text("quant_method", "an unnamed method"):
        case "compressed-tensors":
            return _compressed_tensors(quantization)
        case "fp8":
            if (form := quantization.text("fmt", "e4m3")) != "e4m3":
                raise quantization.fail("fmt", f"is {shown(form)}; only e4m3 is read")
            return _block(quantization, "weight_block_size")
        case "fbgemm_fp8":
            return None
        case "modelopt":
            if (form := quantization.text("quant_algo", "nothing")) != "FP8":
                raise quantization.fail("quant_algo", f"is {shown(form)}; only FP8 is read")
            return None
    raise fields.fail("quantization_config", f"asks for {shown(method)}, not supported")


def _compressed_tensors(fields: Fields) -> Block | None:
    """Read the weights of all groups, which must be of one kind."""
    form = fields.text("format", "float-quantized")
    if form not in ("float-quantized", "naive-quantized"):
        raise fields.fail("format", f"is {shown(form)}; only float-quantized is read")
    groups = fields.inner("config_groups")
    blocks: set[Block | None] = set()
    for name in groups.names() if groups else ():
        group = groups.inner(name) if groups else None
        weights = group.inner("weights") if group else None
        if weights is None:
            raise fields.fail(f"config_groups.{name}.weights", "is missing")
        kind, num_bits = weights.text("type"), weights.integer("num_bits")
        if (kind, num_bits) != ("float", 8):
            raise weights.fail("type", f"is {shown(kind)} in {num_bits} bits; only fp8 is read")
        strategy = weights.text("strategy")
        if strategy not in ("tensor", "channel", "block"):
            raise weights.fail("strategy", f"is {shown(strategy)}, not tensor, channel or block")
        blocks.add(_block(weights, "block_structure") if strategy == "block" else None)
    if len(blocks) != 1:
        raise fields.fail("config_groups", f"holds {len(blocks)} kinds of weights, not one")
    return blocks.pop()


def _block(fields: Fields, name: str) -> Block | None:
    sizes = fields.raw(name)
    if sizes is None:
        return None
    if isinstance(sizes, list) and len(sizes) == 2:
        rows, columns = sizes
        if type(rows) is int and type(columns) is int and 0 < min(rows, columns) < 2**20:
            return rows, columns
    raise fields.fail(name, f"must be two sizes, not {shown(sizes)}")


class Fp8Store:
    """Tensors of a folder in which matrices are codes; scales belong to them and have no name."""

    def __init__(self, stored: SafetensorsStore, config: ModelConfig, block: Block | None) -> None:
        self._stored = stored
        self._block = block
        self._scales: dict[str, str] = {}  # of each matrix in fp8: the name of its scales
        self._infos = dict(stored.infos)
        for name in required_tensors(config):
            info = stored.infos.get(name)
            if info is not None and info.dtype == FP8 and len(info.shape) == 2:
                self._scales[name] = self._scales_of(name, info)
                self._infos[name] = replace(info, dtype=FP8_CODES, is_readable=True)
                del self._infos[self._scales[name]]
        self._kv_scales = [self._kv_scale_names(layer) for layer in range(config.num_layers)]
        self._drop(name for names in self._kv_scales for name in names if name)
        suffixes = tuple(f"_proj.{name}" for name in _STATIC)
        static = [name for name in self._infos if name.endswith(suffixes)]
        self._drop(static)
        if static:
            logger.info(
                "%d static scales of activations are not used: each token gets its own", len(static)
            )

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> Tensor:
        """Return a tensor; a matrix in fp8 as float32: code * scale."""
        stored = self._stored.read(name)
        if name not in self._scales:
            return stored
        scales = self._read_scales(name)
        if self._block and scales.numel() > 1:
            rows, columns = self._block
            scales = scales.repeat_interleave(rows, 0)[: stored.shape[0]]
            scales = scales.repeat_interleave(columns, 1)[:, : stored.shape[1]]
        else:
            scales = scales.view(-1, 1)
        return stored.to(torch.float32) * scales

    def rows(self, name: str) -> Fp8Rows | None:
        """Return a matrix in fp8 as it is in the file; None where it has blocks or 16 bits."""
        if name not in self._scales:
            return None
        scales = self._read_scales(name)
        if self._block and scales.numel() > 1:
            return None
        codes = self._stored.read(name)
        return Fp8Rows(codes, scales.view(-1, 1).expand(codes.shape[0], 1).contiguous())

    def kv_scales(self) -> list[tuple[float, float]]:
        """Return the scales of keys and values of each layer; 1 where the file has none.

        Raises WeightsError.
        """
        return [(self._kv_scale(keys), self._kv_scale(values)) for keys, values in self._kv_scales]

    def packed(self, name: str) -> PackedTensor | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        self._stored.close()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._infos.pop(name, None)

    def _scales_of(self, name: str, info: TensorInfo) -> str:
        """Find the scales of a matrix and check their shape. Raises WeightsError."""
        where = f"{info.file}: tensor {shown(info.stored_name)}"
        stem = name.removesuffix("weight")
        found = [stem + each for each in _SCALES if stem + each in self._stored.infos]
        if not found:
            raise WeightsError(f"{where} is in fp8, but {stem}weight_scale is missing")
        scales = self._stored.infos[found[0]]
        shapes = [(), (1,), (1, 1), (info.shape[0],), (info.shape[0], 1)]
        if self._block:
            shapes.append(
                tuple(-(-size // n) for size, n in zip(info.shape, self._block, strict=True))
            )
        if scales.shape not in shapes or not scales.is_readable:
            raise WeightsError(
                f"{where} is in fp8, but its scales are {scales.dtype} {list(scales.shape)}, "
                "and not one for the tensor, each output or each block"
            )
        return found[0]

    def _read_scales(self, name: str) -> Tensor:
        scales = self._stored.read(self._scales[name]).to(torch.float32)
        if not bool(torch.isfinite(scales).all()):
            info = self._stored.infos[self._scales[name]]
            raise WeightsError(f"{info.file}: tensor {shown(info.stored_name)} is not finite")
        return scales

    def _kv_scale_names(self, layer: int) -> tuple[str | None, str | None]:
        prefix = f"model.layers.{layer}."
        keys, values = (
            next((prefix + each for each in names if prefix + each in self._infos), None)
            for names in _KV_SCALES.values()
        )
        shared = prefix + _SHARED_KV_SCALE
        default = shared if shared in self._infos else None
        return keys or default, values or default

    def _kv_scale(self, name: str | None) -> float:
        if name is None:
            return 1.0
        info = self._stored.infos[name]
        where = f"{info.file}: tensor {shown(info.stored_name)}"
        if not info.is_readable or math.prod(info.shape) != 1:
            raise WeightsError(
                f"{where} is {info.dtype} {list(info.shape)}; keys and values have one scale a "
                "layer here"
            )
        scale = float(self._stored.read(name).to(torch.float32).item())
        if not 0 < scale < math.inf:
            raise WeightsError(f"{where} is {scale}, not a scale")
        return scale
