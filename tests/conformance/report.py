"""docs/conformance.md as text: verdicts from asking, and a line of prose where one helps."""

import json
from dataclasses import dataclass
from pathlib import Path

from app.api.openapi import openapi_document
from tests.conformance.answers import CHAT, COMPLETIONS, SCHEMAS, Seen
from tests.conformance.document import Document
from tests.conformance.errors import MISHAPS, meet
from tests.conformance.fields import (
    HARMLESS,
    REFUSED,
    REVEALING,
    USUAL,
    Prober,
    Row,
    application_with,
    unsupported_elsewhere,
)

REPORT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
REQUESTS = {  # url -> the document's name of its body, ours
    COMPLETIONS: ("CreateCompletionRequest", "CompletionRequest"),
    CHAT: ("CreateChatCompletionRequest", "ChatRequest"),
}

# Where answers are known not to be as the document has them: kind, path, what stands there.
KNOWN: dict[tuple[str, str, str], str] = {
    ("completion, streamed", "choices.*.finish_reason", "null"): (
        "The document has no form of its own for the events of a streamed completion; null before "
        "the end is what OpenAI's service sends."
    ),
    **{
        (kind, f"choices.*.logprobs.{name}.*", "null"): (
            "With `echo`: nothing comes before the prompt's first token, so it has no probability. "
            "OpenAI's service has null there too, and evaluation harnesses expect it."
        )
        for kind in ("completion", "completion, streamed")
        for name in ("token_logprobs", "top_logprobs")
    },
}

BOUNDS: dict[str, str] = {  # told where values are refused
    "best_of": "at least 1",
    "max_tokens": "0 only with `echo` or `prompt_logprobs`",
    "prompt": "there must be one",
    "seed": "a signed 64-bit integer; the document's ends are those rounded",
}
NOTES: dict[str, str] = {
    "model": "any served name, and may be left out; another name is a 404",
    "user": "not kept",
    "metadata": "not kept",
    "safety_identifier": "not kept",
    "prompt_cache_key": "prefixes are found without it; see `cache_salt`",
    "prompt_cache_retention": "prefixes are kept while there is room",
    "modalities": "text alone",
    "store": "nothing is kept",
    "service_tier": "all requests are alike; see `priority`",
    "response_format[json_schema].json_schema.strict": "a schema is enforced either way",
    "response_format[json_schema].json_schema.description": "the model is not told",
    "tools[function].function.strict": "a forced call is held to its schema either way",
    "stream_options.include_obfuscation": "nothing is padded",
    "function_call": "the name of old for `tool_choice`",
    "functions": "the name of old for `tools`",
}
SUFFIX_NOTES = {".prompt_cache_breakpoint": "prefixes are found without it"}

EXTENSIONS: dict[str, str] = {
    "add_generation_prompt": "whether the template opens the assistant's turn",
    "add_special_tokens": "whether a prompt begins with the model's begin-of-text",
    "allowed_token_ids": "nothing but these is generated",
    "bad_words": "texts that are not generated",
    "cache_prompt": "false: no K/V is taken from the prefix cache (llama.cpp's name)",
    "cache_salt": "the prefix cache is shared only with requests of the same salt",
    "chat_template_kwargs": "further variables for the template",
    "continue_final_message": "the last message is continued instead of answered",
    "guided_choice": "`structured_outputs.choice` under its older name",
    "guided_grammar": "`structured_outputs.grammar` under its older name",
    "guided_json": "`structured_outputs.json` under its older name",
    "guided_regex": "`structured_outputs.regex` under its older name",
    "guided_whitespace_pattern": "the white space that `guided_json` allows",
    "ignore_eos": "generate past the end of text",
    "include_reasoning": "false: thoughts are left out of the answer",
    "include_stop_str_in_output": "keep the stop string, or the text of the stop token",
    "json_schema": "JSON that satisfies a schema (SGLang's and llama.cpp's name)",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "min_tokens": "no end before so many tokens",
    "parse_special": "whether control tokens written in a text count as such",
    "priority": "lower runs earlier",
    "prompt_logprobs": "so many candidates for each token of the prompt; not streamed",
    "repetition_penalty": "divides the scores of what was said before",
    "response_format": "as in chat",
    "return_token_ids": "ids of prompt and answer beside the text",
    "return_tokens_as_token_ids": "tokens of log-probabilities as `token_id:…`",
    "skip_special_tokens": "false: control tokens are part of the text",
    "stop_token_ids": "ids that end the answer",
    "structured_outputs": "a form: `json`, `json_object`, `regex`, `choice` or `grammar`",
    "top_k": "sample from the likeliest so many; 0 or -1: from all",
    "truncate_prompt_tokens": "keep the prompt's last tokens; -1: as many as fit",
}

HEAD = """# What OpenAI's document says, and what this server does

Written by `scripts/conformance`, which sends every field and holds every answer against OpenAI's
OpenAPI document (version {version}) and the types of its Python SDK. A test fails when this page is
out of date.

## Requests

Each value that the document allows for a field (one of each kind, the ends of a range, null) was
sent to the whole server over a scripted engine, and compared with the same request without it:

- **works**: the engine was asked, or the answer came out, otherwise;
- **given to the template**: a model whose template looks for it sees it;
- **refused**: a 400 that names the field, unless it says what its absence says;
- **ignored, named**: no effect, and the answer's `x-ignored-fields` header says so;
- **no effect**: there is nothing to do about it, or it is done anyway.

The parts of a field that is refused or ignored are not listed. null is taken wherever the document
allows it, unless it is among the values refused.
"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of every field, by the path of the route."""

    rows: dict[str, list[Row]]
    extensions: dict[str, list[Row]]  # fields that we have and the document does not
    refused: list[str]  # known from other servers


async def ask(document: Document) -> Asked:
    """Send every field of the document, and of ours."""
    own = Document(openapi_document("1"))
    known = {url: document.properties(theirs) for url, (theirs, _) in REQUESTS.items()}
    rows: dict[str, list[Row]] = {}
    extensions: dict[str, list[Row]] = {}
    async with application_with(USUAL) as usual, application_with(REVEALING) as revealing:
        prober = Prober(usual, revealing)
        for url, (_, ours) in REQUESTS.items():
            rows[url] = await prober.rows(url, document, known[url], inside=True)
            new = {k: v for k, v in own.properties(ours).items() if k not in known[url]}
            extensions[url] = await prober.rows(url, own, new, inside=False)
        names = unsupported_elsewhere(*known.values())
        refused = await prober.refused_names(COMPLETIONS, names)
    return Asked(rows=rows, extensions=extensions, refused=refused)


async def report(document: Document, asked: Asked, seen: dict[str, Seen]) -> str:
    """Return the page."""
    parts = [
        HEAD.format(version=document.version),
        *_requests(asked),
        *_answers(document, seen),
        *_deviations(seen),
        *await _errors(),
    ]
    return "\n".join(parts)


def _requests(asked: Asked) -> list[str]:
    parts: list[str] = []
    verdicts: dict[str, dict[str, str]] = {}
    for url in REQUESTS:
        parts += [f"### POST {url}", "", *_field_table(asked.rows[url]), ""]
        for row in asked.extensions[url]:
            verdicts.setdefault(row.path, {})[url] = row.verdict
    return [
        *parts,
        "### Fields that OpenAI does not have",
        "",
        "vLLM's names and meanings, unless said otherwise.",
        "",
        "| field | completions | chat | what it does |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | {on.get(COMPLETIONS, '')} | {on.get(CHAT, '')} | {EXTENSIONS[name]} |"
            for name, on in sorted(verdicts.items())
        ),
        "",
        "Known from other servers and refused: "
        + ", ".join(f"`{name}`" for name in asked.refused)
        + ".",
        "Any other name is ignored and named.",
        "",
    ]


def _note(row: Row) -> str:
    notes = [NOTES[row.path]] if row.path in NOTES else []
    notes += [BOUNDS[row.path]] if row.path in BOUNDS and REFUSED in row.verdicts else []
    notes += [note for suffix, note in SUFFIX_NOTES.items() if row.path.endswith(suffix)]
    return "; ".join(notes)


def _field_table(rows: list[Row]) -> list[str]:
    lines = ["| field | | values refused | |", "|---|---|---|---|"]
    for row in rows:
        refused = row.verdicts.get(REFUSED, [])
        if row.verdict == REFUSED:
            taken = [value for value in row.verdicts.get(HARMLESS, []) if value is not None]
            told = f"all but {_values(taken)}" if taken else ""
        else:
            told = _values(refused)
        lines.append(f"| `{row.path}` | {row.verdict} | {told} | {_note(row)} |")
    return lines


def _values(values: list[object]) -> str:
    texts = dict.fromkeys(json.dumps(value)[:60] for value in values)
    return ", ".join(f"`{text}`" for text in texts)


def _answers(document: Document, seen: dict[str, Seen]) -> list[str]:
    parts = [
        "## Answers",
        "",
        "What was in the answers to requests of every kind; `*` is any place in a list. Fields",
        "that the document does not have are ours, or vLLM's.",
        "",
    ]
    for kind, found in seen.items():
        known = document.paths(SCHEMAS[kind][0])
        extras = found.extras(document, kind)
        never = [
            path for path in known if path not in found.paths and _parent_is_given(path, found)
        ]
        parts += [
            f"### {kind} (`{SCHEMAS[kind][0]}`)",
            "",
            "| field | given | null |",
            "|---|---|---|",
        ]
        given = [path for path in known if path in found.paths and not path.endswith("*")]
        for path in [*given, *sorted(extras)]:
            how = "always" if _is_always(path, found) else "at times"
            own = ", not in the document" if path in extras else ""
            parts.append(f"| `{path}` | {how}{own} | {'at times' if path in found.nulls else ''} |")
        names = ", ".join(f"`{path}`" for path in never if not path.endswith("*"))
        parts += ["", f"Never given: {names or 'none'}.", ""]
    return parts


def _parent_is_given(path: str, found: Seen) -> bool:
    parent = path.rpartition(".")[0]
    return not parent or parent in found.paths


def _is_always(path: str, found: Seen) -> bool:
    parent = path.rpartition(".")[0]
    return found.paths[path] == (found.paths[parent] if parent else found.count)


def _deviations(seen: dict[str, Seen]) -> list[str]:
    lines = ["## Where answers are not as the document has them", ""]
    lines += ["| answer | field | has | why |", "|---|---|---|---|"]
    for kind, found in seen.items():
        for deviation in sorted(found.by_document, key=lambda d: d.path):
            why = KNOWN.get((kind, deviation.path, deviation.found), "")
            lines.append(f"| {kind} | `{deviation.path}` | {deviation.found} | {why} |")
    lines += [
        "",
        "With `include_usage`, the document's prose has `usage: null` in the events before the",
        "last; here they have no `usage`, as in a stream that did not ask for it.",
    ]
    return [*lines, ""]


async def _errors() -> list[str]:
    lines = [
        "## Errors",
        "",
        'All are `{"error": {"message", "type", "param", "code"}}`, in a stream as its last event.',
        "",
        "| what | status | `type` | `code` | `param` |",
        "|---|---|---|---|---|",
    ]
    for name, (_, mishap) in MISHAPS.items():
        status, body = await meet(mishap)
        told = [body["error"][key] for key in ("type", "code", "param")]
        cells = " | ".join(f"`{text}`" if text else "" for text in told)
        lines.append(f"| {name} | {status} | {cells} |")
    return [*lines, ""]
