"""What every use case needs: the engine, the tokenizer and the facts about the model."""

import time
from dataclasses import dataclass, field

from app.engine.client import EngineClient
from app.errors import ModelNotFound
from app.serving.metrics import RequestMetrics
from app.serving.request_log import RequestLog
from app.serving.tracing import RequestTracer
from app.text.chat_template import ChatTemplate
from app.text.grammar.compiler import GrammarCompiler
from app.text.tools.parser import ToolFormat
from model.config import GenerationDefaults
from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingContext:
    """One served model."""

    engine: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model_names: tuple[str, ...]  # the first is the one that answers carry
    max_model_len: int
    vocab_size: int
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]
    system_fingerprint: str
    precision: str  # in words
    metrics: RequestMetrics
    grammars: GrammarCompiler
    tool_format: ToolFormat
    requests: RequestLog = field(default_factory=RequestLog)
    tracer: RequestTracer | None = None
    think_tags: tuple[str, str] | None = None
    tag_token_ids: frozenset[int] = frozenset()  # control tokens that mark calls and thoughts
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFound unless the name is served here; no name means the only model."""
        if name is not None and name not in self.model_names:
            raise ModelNotFound(f"The model '{name[:100]}' does not exist.", param="model")
