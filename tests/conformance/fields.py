"""Every field of a request, sent: what came of it says whether it works.

A field works if the engine was asked, or the answer came out, otherwise than without it. What a
field ought to do is not known here; that is what the other tests are for.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import httpx

from app.factory import create_app
from app.protocol.common import UNSUPPORTED
from app.settings import ServerSettings
from app.text.chat_template import ChatTemplate
from tests.api.serve import events
from tests.conformance.answers import CHAT, COMPLETIONS, TEXT, THINK_TAGS, TOOL
from tests.conformance.document import ABSENT, Document, Sample
from tests.fake_engine import EOS, ByteTokenizer, FakeEngine, make_context

WORKS, REFUSED, IGNORED, HARMLESS = "works", "refused", "ignored, named", "no effect"
TEMPLATE_SEES = "given to the template"

# As most models have it, and one that shows all that a template is given.
USUAL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REVEALING = (
    "{{ reasoning_effort }}{{ enable_thinking }}"
    "{% for message in messages %}{{ message | tojson }}{% endfor %}"
) + USUAL
BASE: dict[str, dict] = {
    COMPLETIONS: {"model": "fake", "prompt": "Hi</s>", "seed": 7, "max_tokens": 400},
    CHAT: {
        "model": "fake",
        "messages": [{"role": "user", "content": "Hi</s>"}],
        "seed": 7,
        "max_tokens": 400,
    },
}
# What must stand beside a field for it to be seen.
COMPANIONS: dict[str, dict] = {
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
    "stream_options": {"stream": True},
    "max_completion_tokens": {"max_tokens": None},
    "include_stop_str_in_output": {"stop": "a"},
    "guided_whitespace_pattern": {"guided_json": {}},
}
CHAT_COMPANIONS: dict[str, dict] = {
    "return_tokens_as_token_ids": {"logprobs": True},
    "continue_final_message": {"messages": [{"role": "assistant", "content": "Hi"}]},
}
COMPLETION_COMPANIONS: dict[str, dict] = {"return_tokens_as_token_ids": {"logprobs": 1}}
# Values where the document allows anything, and further ones.
HINTS: dict[str, object] = {
    "tool_choice[allowed_tools].allowed_tools.tools": [
        {"type": "function", "function": {"name": "a"}}
    ],
    "tools[function].function.parameters": {"type": "object", "properties": {"b": {}}},
    "guided_whitespace_pattern": "[ ]",
    "model": "other-name",
}
MORE: dict[str, list[object]] = {
    "chat_template_kwargs": [{"enable_thinking": True}],
    "structured_outputs": [{"json": {}}],
    "model": ["nobody"],
    "guided_grammar": ['start: "a"'],
    "prompt": [[72, 105], [[72, 105], [97]], ["a", "b"]],
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one request: what the engine was asked and the client was told."""

    status: int
    param: str | None
    ignored: frozenset[str]
    asked: object
    answered: object

    def does_the_same_as(self, other: "Outcome") -> bool:
        return (self.asked, self.answered) == (other.asked, other.answered)


@dataclass
class Row:
    """A field, or a part of one, with what came of its values."""

    path: str
    verdicts: dict[str, list[object]] = field(default_factory=dict)  # -> values

    @property
    def verdict(self) -> str:
        """Return the word for all: what works with some value works."""
        order = (WORKS, TEMPLATE_SEES, IGNORED, REFUSED, HARMLESS)
        return next(word for word in order if word in self.verdicts)


class Application:
    """The whole service over a scripted engine; asks each thing once."""

    def __init__(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        self._client = client
        self._engine = engine
        self._known: dict[str, Outcome] = {}

    async def ask(self, url: str, body: dict) -> Outcome:
        key = url + json.dumps(body, sort_keys=True)
        if key not in self._known:
            self._known[key] = await self._post(url, body)
        return self._known[key]

    async def _post(self, url: str, body: dict) -> Outcome:
        self._engine.requests.clear()
        response = await self._client.post(url, json=body)
        named = response.headers.get("x-ignored-fields", "")
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        answered = events(response.text) if is_stream else response.json()
        error = None if is_stream else answered.get("error")
        return Outcome(
            status=response.status_code,
            param=error["param"] if error else None,
            ignored=frozenset(name for name in named.split(", ") if name),
            asked=[_asked(request) for request in self._engine.requests],
            answered=_without_chance(answered),
        )


class Prober:
    """Sends fields to two applications that differ in their template."""

    def __init__(self, usual: Application, revealing: Application) -> None:
        self._usual = usual
        self._revealing = revealing

    async def rows(
        self, url: str, document: Document, fields: dict[str, dict], *, inside: bool
    ) -> list[Row]:
        """Return a row for each field, and where `inside` says so for its parts."""
        rows: dict[str, Row] = {}
        for name, schema in fields.items():
            rows[name] = Row(name)
            for sample in [*document.samples(name, schema, HINTS), *_more(name)]:
                path = sample.path if inside else name
                row = rows.setdefault(path, Row(path))
                verdict = await self._verdict(url, name, sample)
                row.verdicts.setdefault(verdict, []).append(sample.leaf)
        return _pruned(rows.values())

    async def refused_names(self, url: str, names: Iterable[str]) -> list[str]:
        """Return those of some fields that are refused, each with a value that says something."""
        base = BASE[url]
        outcomes = [(name, await self._usual.ask(url, {**base, name: "a"})) for name in names]
        return [name for name, got in outcomes if got.status == 400 and got.param == name]

    async def _verdict(self, url: str, name: str, sample: Sample) -> str:
        own = CHAT_COMPANIONS if url == CHAT else COMPLETION_COMPANIONS
        base = {**BASE[url], **COMPANIONS.get(name, {}), **own.get(name, {})}
        body = {**base, name: sample.value}
        got = await self._usual.ask(url, body)
        if got.status == 404:
            return WORKS  # a name that is looked up
        if got.status == 400:
            assert got.param is not None, (name, sample)
            assert got.param.split(".")[0] == name, (name, sample, got.param)
            return REFUSED
        assert got.status == 200, (name, sample, got)
        if got.ignored:
            assert {ignored.split(".")[0] for ignored in got.ignored} == {name}
            return IGNORED
        for application, verdict in ((self._usual, WORKS), (self._revealing, TEMPLATE_SEES)):
            got = await application.ask(url, body)
            without = await application.ask(
                url, base if sample.against is ABSENT else {**base, name: sample.against}
            )
            if without.status != 200:
                without = await application.ask(url, base)
            if not got.does_the_same_as(without):
                return verdict
        return HARMLESS


@contextlib.asynccontextmanager
async def application_with(template: str) -> AsyncIterator[Application]:
    """Answer with all that fields could change: thoughts, calls, control tokens."""
    engine = FakeEngine(lambda request, sampling: [*TEXT.encode(), 256, EOS], max_model_len=4096)
    tokenizer = ByteTokenizer()
    chat_template = ChatTemplate(
        template,
        special_tokens=tokenizer.special_token_texts,
        added_tokens=tokenizer.added_tokens,
    )
    context = replace(make_context(engine, think_tags=THINK_TAGS), chat_template=chat_template)
    transport = httpx.ASGITransport(app=create_app(context, ServerSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Application(client, engine)
    context.grammars.close()


def unsupported_elsewhere(*documents: dict[str, dict]) -> list[str]:
    """Return the fields that we refuse by name and OpenAI does not have."""
    return sorted(name for name in UNSUPPORTED if not any(name in known for known in documents))


def _more(name: str) -> Iterator[Sample]:
    for value in MORE.get(name, []):
        yield Sample(path=name, leaf=value, value=value)


def _pruned(rows: Iterable[Row]) -> list[Row]:
    """Leave out the parts of what is refused or ignored as a whole, and wholes without effect."""
    kept: list[Row] = []
    closed: list[str] = []
    rows = [row for row in rows if row.verdicts]
    for row in rows:
        has_parts = any(_is_inside(other.path, row.path) for other in rows)
        if has_parts and row.verdict == HARMLESS:
            continue
        if any(_is_inside(row.path, path) for path in closed):
            continue
        kept.append(row)
        if row.verdict in (REFUSED, IGNORED):
            closed.append(row.path)
    return kept


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and path.startswith(outer) and path[len(outer)] in ".["


def _asked(request) -> object:
    probes = (b'{"a":1}', b"a", b"1", b'{ "a":1}', b"<tool_call>")
    allowed = [
        [constraint.num_allowed(list(probe)) for probe in probes]
        for constraint in request.constraints
    ]
    own = (request.prompt_token_ids, request.sampling, request.priority, request.cache_salt)
    return *own, request.read_prefix_cache, allowed


def _without_chance(node):
    """Return an answer without what is drawn or read from a clock."""
    if isinstance(node, dict):
        return {k: _without_chance(v) for k, v in node.items() if k not in ("id", "created")}
    return [_without_chance(item) for item in node] if isinstance(node, list) else node
