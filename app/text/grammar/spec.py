"""What a request demands of its text, checked and bounded before anything is compiled.

Knows the wire names of nothing: the caller says which field a fault is to be blamed on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from app.errors import InvalidRequest

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]

MAX_BYTES = 128 << 10
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_ENUM = 2_000  # entries of one enum, and choices
ANY_OBJECT: Mapping[str, object] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A demand: its kind, its text, and which white space JSON may have between its parts.

    `grammar` is Lark or GBNF, whichever it turns out to be; `choice` a JSON list of strings.
    """

    kind: Kind
    text: str
    whitespace: str | None = None  # a regex; None: none at all


def json_spec(schema: object, *, param: str, whitespace: str | None = None) -> GrammarSpec:
    """Return the demand for JSON that satisfies a schema, given as an object or as its text."""
    if isinstance(schema, str):
        _check_size(schema, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"'{param}' is not valid JSON.", param=param) from None
    if not isinstance(schema, Mapping | bool):
        raise InvalidRequest(f"'{param}' must be a JSON schema.", param=param)
    _check_tree(schema, param)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    _check_size(text, param)
    return GrammarSpec("json_schema", text, whitespace)


def text_spec(kind: Kind, text: str, *, param: str) -> GrammarSpec:
    """Return the demand for a text that matches a regex or a grammar."""
    if not text:
        raise InvalidRequest(f"'{param}' is empty.", param=param)
    _check_size(text, param)
    return GrammarSpec(kind, text)


def choice_spec(choices: Sequence[str], *, param: str) -> GrammarSpec:
    """Return the demand for one of some texts."""
    if not 0 < len(choices) <= MAX_ENUM:
        raise InvalidRequest(f"'{param}' must have 1 to {MAX_ENUM} choices.", param=param)
    if not all(choices):
        raise InvalidRequest(f"'{param}' may not hold an empty choice.", param=param)
    text = json.dumps(choices, ensure_ascii=False)
    _check_size(text, param)
    return GrammarSpec("choice", text)


def _check_size(text: str, param: str) -> None:
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise InvalidRequest(f"'{param}' is larger than {MAX_BYTES} bytes.", param=param)


def _check_tree(schema: object, param: str) -> None:
    """Bound a schema's depth, size and enums; no recursion, since its depth is not yet known."""
    num_nodes = 0
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH):
        following: list[object] = []
        for node in level:
            children: Sequence[object] = ()
            if isinstance(node, dict):
                children = list(node.values())
                enum = node.get("enum")
                if isinstance(enum, list) and len(enum) > MAX_ENUM:
                    raise InvalidRequest(
                        f"'{param}': an enum has more than {MAX_ENUM} entries.", param=param
                    )
            elif isinstance(node, list):
                children = node
            num_nodes += len(children)
            following += [child for child in children if isinstance(child, dict | list)]
        if num_nodes > MAX_NODES:
            raise InvalidRequest(f"'{param}' has more than {MAX_NODES} values.", param=param)
        if not following:
            return
        level = following
    raise InvalidRequest(f"'{param}' is nested more than {MAX_DEPTH} levels deep.", param=param)
