"""Answers of the whole application to requests of every kind, as what OpenAI says they are.

The engine is scripted; all else is real. Knows what was asked, not what is right.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from pydantic import BaseModel, ValidationError

from tests.api.serve import client_of, events
from tests.conformance.document import Deviation, Document, joined, paths_in
from tests.fake_engine import EOS, FakeEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "a", "arguments": {"b": "é"}}\n</tool_call>'
TEXT = f"<think>\nHm.\n</think>\n\nIt is a 🦙.\n{CALL}\n{CALL}"
ONLY_CALLS = "Only calls"
THINK_TAGS = ("<think>", "</think>")
HELLO = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
SAY = {"model": "fake", "prompt": "Hi"}
USAGE = {"stream_options": {"include_usage": True}}
EACH_USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

BODIES: dict[str, tuple[str, dict]] = {
    "completion": (COMPLETIONS, SAY),
    "completion, cut": (COMPLETIONS, {**SAY, "max_tokens": 2}),
    "completion, n": (COMPLETIONS, {**SAY, "n": 2, "prompt": ["a", "b"], "best_of": 2}),
    "completion, stop": (COMPLETIONS, {**SAY, "stop": "is", "max_tokens": 100}),
    "completion, logprobs": (COMPLETIONS, {**SAY, "logprobs": 2}),
    "completion, logprobs 0": (COMPLETIONS, {**SAY, "logprobs": 0}),
    "completion, usage": (COMPLETIONS, {**SAY, **USAGE}),
    "completion, usage in each": (COMPLETIONS, {**SAY, **EACH_USAGE}),
    "completion, echo": (COMPLETIONS, {**SAY, "echo": True}),
    "completion, echo with logprobs": (COMPLETIONS, {**SAY, "echo": True, "logprobs": 2}),
    "completion, ids": (COMPLETIONS, {**SAY, "return_token_ids": True}),
    "completion, prompt_logprobs": (COMPLETIONS, {**SAY, "prompt_logprobs": 1}),
    "chat": (CHAT, HELLO),
    "chat, cut": (CHAT, {**HELLO, "max_tokens": 25}),
    "chat, n": (CHAT, {**HELLO, "n": 2}),
    "chat, stop": (CHAT, {**HELLO, "stop": "is"}),
    "chat, logprobs": (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 2}),
    "chat, logprobs alone": (CHAT, {**HELLO, "logprobs": True}),
    "chat, usage": (CHAT, {**HELLO, **USAGE}),
    "chat, usage in each": (CHAT, {**HELLO, **EACH_USAGE}),
    "chat, tools": (CHAT, {**HELLO, "tools": [TOOL]}),
    "chat, nothing but calls": (
        CHAT,
        {"messages": [{"role": "user", "content": ONLY_CALLS}], "tools": [TOOL]},
    ),
    "chat, one tool": (CHAT, {**HELLO, "tools": [TOOL], "parallel_tool_calls": False}),
    "chat, tools and logprobs": (CHAT, {**HELLO, "tools": [TOOL], "logprobs": True}),
    "chat, ids": (CHAT, {**HELLO, "return_token_ids": True}),
    "chat, prompt_logprobs": (CHAT, {**HELLO, "prompt_logprobs": 1}),
}
WHOLE_ONLY = {name for name in BODIES if "prompt_logprobs" in name or name == "completion, n"}
SCHEMAS: dict[str, tuple[str, type[BaseModel]]] = {  # ours -> the document's, the SDK's
    "completion": ("CreateCompletionResponse", Completion),
    "completion, streamed": ("CreateCompletionResponse", Completion),
    "chat": ("CreateChatCompletionResponse", ChatCompletion),
    "chat, streamed": ("CreateChatCompletionStreamResponse", ChatCompletionChunk),
    "model": ("Model", Model),
}


class SdkModelList(BaseModel):
    """What the SDK has as a page: its own class cannot be made from data alone."""

    object: str
    data: list[Model]


class SdkErrorBody(BaseModel):
    """The SDK's own error inside of the envelope that its client takes off."""

    error: ErrorObject


def engine() -> FakeEngine:
    """Return an engine that says all at once: thoughts, words and calls, or calls alone."""
    words = {True: f"{CALL}\n{CALL}".encode(), False: TEXT.encode()}

    def script(request, sampling):
        is_terse = bytes(ONLY_CALLS, "ascii") in bytes(i % 256 for i in request.prompt_token_ids)
        return [*words[is_terse], EOS]

    return FakeEngine(script, max_model_len=4096)


@dataclass
class Seen:
    """What the answers of one kind had, and where they are not as they should be."""

    count: int = 0
    paths: Counter[str] = field(default_factory=Counter)  # answers that have it
    nulls: set[str] = field(default_factory=set)
    by_document: dict[Deviation, set[str]] = field(default_factory=dict)  # -> requests
    by_sdk: dict[Deviation, set[str]] = field(default_factory=dict)
    unknown_to_sdk: set[str] = field(default_factory=set)  # paths

    def add(self, request: str, answer: dict, document: Document, kind: str) -> None:
        schema, model = SCHEMAS[kind]
        self.count += 1
        found = list(paths_in(answer))
        self.paths.update({path for path, _ in found})
        self.nulls.update(path for path, is_null in found if is_null)
        for deviation in document.deviations(answer, schema):
            self.by_document.setdefault(deviation, set()).add(request)
        for deviation in sdk_deviations(answer, model):
            self.by_sdk.setdefault(deviation, set()).add(request)
        self.unknown_to_sdk.update(_sdk_extras(model.construct(**answer)))

    def extras(self, document: Document, kind: str) -> list[str]:
        """Return the paths that the document does not have, the topmost of each."""
        known = document.paths(SCHEMAS[kind][0])

        def is_extra(path: str) -> bool:
            parent = path.rpartition(".")[0]
            return path not in known and (not parent or known.get(parent) is False)

        return [path for path in self.paths if is_extra(path)]


def sdk_deviations(answer: object, model: type[BaseModel]) -> set[Deviation]:
    """Return what the SDK's type, read strictly, says against an answer."""
    try:
        model.model_validate(answer, strict=True)
    except ValidationError as error:
        return {
            Deviation(path=joined(fault["loc"]), found=json.dumps(fault["input"])[:80])
            for fault in error.errors(include_url=False)
        }
    return set()


def _sdk_extras(value: object, path: str = "") -> Iterator[str]:
    """Yield the paths that the SDK's types keep as fields that they do not know."""
    if isinstance(value, list):
        for item in value:
            yield from _sdk_extras(item, f"{path}*.")
    elif isinstance(value, BaseModel):
        unknown = value.model_extra or {}
        for name, inner in value:
            if name in unknown:
                yield path + name
            else:
                yield from _sdk_extras(inner, f"{path}{name}.")


async def see(document: Document) -> dict[str, Seen]:
    """Ask for every kind of answer, whole and streamed, and return what they had."""
    seen = {kind: Seen() for kind in SCHEMAS}
    async with client_of(engine(), think_tags=THINK_TAGS) as client:
        for name, (url, body) in BODIES.items():
            kind = "chat" if url == CHAT else "completion"
            response = await client.post(url, json=body)
            assert response.status_code == 200, (name, response.text)
            seen[kind].add(name, response.json(), document, kind)
            if name in WHOLE_ONLY:
                continue
            streamed = await client.post(url, json={**body, "stream": True})
            for event in events(streamed.text):
                kind_streamed = f"{kind}, streamed"
                seen[kind_streamed].add(name, event, document, kind_streamed)
        card = (await client.get("/v1/models/fake")).json()
        seen["model"].add("GET /v1/models/fake", card, document, "model")
    return seen
