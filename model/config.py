"""The shape of a Llama model, wherever it was read from. Torch-free.

The readers of config.json, params.json and GGUF headers live in `model/weights`; all of them
end in `ModelConfig`, whose `validate` refuses what cannot be built before anything is allocated.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
DTYPES = ("float32", "float16", "bfloat16")
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)
MAX_POSITIONS = 2**27
MAX_PARAMETERS = 2**42
_MOST = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_layers": 2**10,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "max_position_embeddings": MAX_POSITIONS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; fields beyond `theta` belong to the scaled kinds only."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    freq_factors: tuple[float, ...] | None = None
    """One divisor for each of the head_dim / 2 inverse frequencies, applied on top of `kind`: how
    GGUF carries Llama 3.1's scaling (its kind is "default" there)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that tells one Llama from another."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"  # of the checkpoint: float32, float16 or bfloat16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """The number of weights, biases included, a tied head counted once."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (q_size + kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        biases = self.attention_bias * (q_size + 2 * kv_size + self.hidden_size)
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        layers = self.num_layers * (attention + mlp + biases + 2 * self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + layers + self.hidden_size

    def validate(self, where: str, names: Mapping[str, str] | None = None) -> None:
        """Refuse what no sound checkpoint says, before anything is allocated for it.

        `where` is the file; `names` gives the file's own name of a field where it differs.
        Raises ConfigError for the first field that is absurd or contradicts another.
        """
        check = _Check(where, names or {})
        for name, most in _MOST.items():
            check.integer(name, getattr(self, name), 1, most)
        check.integer("head_dim", self.head_dim, 2, 2**12)
        if self.head_dim % 2:
            check.fail("head_dim", f"is {self.head_dim}, but rotary embeddings need an even one")
        if self.num_heads % self.num_kv_heads:
            check.fail(
                "num_heads", f"is {self.num_heads}, not a multiple of {self.num_kv_heads} K/V heads"
            )
        check.number("rms_norm_eps", self.rms_norm_eps, above=0.0, most=1.0)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                check.fail(name, f"must be true or false, not {shown(getattr(self, name))}")
        if self.dtype not in DTYPES:
            check.fail("dtype", f"is {shown(self.dtype)}, not one of {', '.join(DTYPES)}")
        for token_id in self.eos_token_ids:
            check.integer("eos_token_ids", token_id, 0, self.vocab_size - 1)
        if self.bos_token_id is not None:
            check.integer("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        self._validate_rope(check)
        if self.num_parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"{where}: these dimensions make {self.num_parameters:.2e} parameters, "
                f"more than the {MAX_PARAMETERS:.2e} that any Llama has"
            )

    def _validate_rope(self, check: "_Check") -> None:
        rope = self.rope
        if rope.kind not in ROPE_KINDS:
            check.fail("rope.kind", f"is {shown(rope.kind)}, not one of {', '.join(ROPE_KINDS)}")
        check.number("rope.theta", rope.theta, above=1.0, most=1e18)
        check.number("rope.factor", rope.factor, least=1.0, most=2.0**16)
        if rope.original_max_position_embeddings is not None:
            original = rope.original_max_position_embeddings
            check.integer("rope.original_max_position_embeddings", original, 1, MAX_POSITIONS)
        elif rope.kind in ("llama3", "yarn"):
            check.fail("rope.original_max_position_embeddings", f"is missing for {rope.kind}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            check.number(f"rope.{low}", getattr(rope, low), above=0.0, most=2.0**16)
            check.number(f"rope.{high}", getattr(rope, high), above=0.0, most=2.0**16)
            if getattr(rope, high) <= getattr(rope, low):
                check.fail(f"rope.{high}", f"must be greater than {low}")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                check.number(f"rope.{name}", getattr(rope, name), least=0.0, most=2.0**16)
        if rope.freq_factors is not None:
            if len(rope.freq_factors) != self.head_dim // 2:
                found, wanted = len(rope.freq_factors), self.head_dim // 2
                check.fail("rope.freq_factors", f"has {found} values for {wanted} frequencies")
            for value in rope.freq_factors:
                check.number("rope.freq_factors", value, above=0.0, most=2.0**16)


def shown(value: object) -> str:
    """Return a value from a file as an error may show it: short, printable, on one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 80
    return short.repr(value).encode("ascii", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class _Check:
    """Bounds that name the file and its own word for the field when they do not hold."""

    where: str
    names: Mapping[str, str]

    def fail(self, name: str, what: str) -> None:
        raise ConfigError(f"{self.where}: {self.names.get(name, name)} {what}")

    def integer(self, name: str, value: object, least: int, most: int) -> None:
        if type(value) is not int:
            self.fail(name, f"must be an integer, not {shown(value)}")
        elif not least <= value <= most:
            self.fail(name, f"must be from {least} to {most}, not {shown(value)}")

    def number(
        self,
        name: str,
        value: object,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float,
    ) -> None:
        if type(value) not in (int, float):
            self.fail(name, f"must be a number, not {shown(value)}")
        assert isinstance(value, int | float)
        if not (least <= value <= most and value > above):  # also refuses NaN
            bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
            self.fail(name, f"must be {bound} and at most {most:g}, not {shown(value)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults that a model's generation_config.json asks for; None: OpenAI's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


LoadFormat = Literal["auto", "safetensors", "gguf", "meta", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to load, where, and how much memory it may take; named after vLLM's flags."""

    model: str  # a folder, a .gguf file or a hub id
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = None
    offline: bool = False
    load_format: LoadFormat = "auto"
    dtype: str = "auto"
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False  # no CUDA graphs
    batch_invariant: bool = False  # on a GPU: a token's bits do not depend on its company
    kv_cache_memory_bytes: int | None = None
    generation_config: Literal["auto", "vllm"] = "auto"
    seed: int = 0  # of dummy weights
    cache_dir: str = ""  # where the native CPU step is compiled to
