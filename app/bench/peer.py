"""What a server under test is: how it is installed, fed, started and asked.

The vocabulary that every other file of this folder shares; it starts nothing itself.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class PeerFault(Exception):
    """A peer cannot be installed, started or trusted; the text is one line for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The weights of one column of runs, in the forms they exist in.

    `first_id` is the lowest id that prompts are drawn from: those below are special.
    """

    name: str
    vocab_size: int
    first_id: int
    checkpoint: Path | None = None  # folder in Hugging Face's form
    gguf: Path | None = None  # where the model comes as a GGUF file


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A virtual environment of its own; `variables` hold for its installation alone.

    `without` is taken out again: torchvision is built for one torch, text needs none of it, and
    libraries fail on one that does not fit where they would do without.
    """

    name: str
    requirements: tuple[str, ...]
    variables: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where a peer finds what it needs before it starts."""

    cache: Path
    python_of: Callable[[Environment], Path]  # installs on demand; raises PeerFault
    arriero_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of a server."""

    model: Path
    port: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRequest:
    """A request as this peer wants it: always streamed and greedy."""

    path: str
    body: dict[str, object]


def replace_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder under another name first, so that one that exists is whole."""
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    make(draft)
    return draft.rename(folder)


def completion_request(
    ids: list[int],
    num_output: int,
    *,
    model: str = "bench",
    extra: dict[str, object] | None = None,
) -> WireRequest:
    """Return OpenAI's completion of token ids, with vLLM's fields for a fixed length."""
    body: dict[str, object] = {
        "model": model,
        "prompt": ids,
        "max_tokens": num_output,
        "min_tokens": num_output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return WireRequest(path="/v1/completions", body=body | (extra or {}))


def _completion_of(_model: Path, ids: list[int], num_output: int) -> WireRequest:
    return completion_request(ids, num_output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server under test. `bits` is the class it is compared in: of its weights.

    `prepare` installs and converts, once, and returns what the server is started with.
    """

    name: str
    bits: int
    prepare: Callable[[Model, Workplace], Path]
    command: Callable[[Launch, Workplace], list[str]]
    is_ours: bool = False
    ready_path: str = "/health"
    request: Callable[[Path, list[int], int], WireRequest] = field(default=_completion_of)


CAPACITY_TOKENS = 8192
"""K/V that a peer is told to plan for: 32 sequences of 192 tokens, and room to spare."""
MAX_SEQUENCES = 32
MAX_MODEL_LEN = 1024
