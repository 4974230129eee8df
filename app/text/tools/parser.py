"""The reader of each format by name, and which format a model's template speaks."""

from collections.abc import Callable, Collection
from typing import Literal

from app.text.tools.hermes import HermesReader
from app.text.tools.llama_json import LlamaJsonReader
from app.text.tools.pythonic import PythonicReader
from app.text.tools.reader import CallReader

ToolFormat = Literal["hermes", "llama3_json", "pythonic"]

READERS: dict[ToolFormat, Callable[[Collection[str]], CallReader]] = {
    "hermes": HermesReader,
    "llama3_json": LlamaJsonReader,
    "pythonic": PythonicReader,
}
# Control tokens that are part of what a reader reads.
TAGS = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>",
    "<think>", "</think>",
)  # fmt: skip


def detect_format(template_source: str | None) -> ToolFormat:
    """Return the format that a template asks its model for; Hermes's where it says nothing."""
    source = template_source or ""
    if "<tool_call>" in source:
        return "hermes"
    if "<|python_start|>" in source or "func_name1(" in source:
        return "pythonic"
    if "<|python_tag|>" in source or '"parameters"' in source:
        return "llama3_json"
    return "hermes"
