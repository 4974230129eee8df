"""The grammar of a forced call in each format, as llguidance's Lark, and how tools are told of.

A forced text is a call of one of the functions, or several, and nothing around it. Arguments follow
the function's schema, in compact JSON.
"""

import json
from collections.abc import Collection, Mapping, Sequence

from app.text.grammar.schema import normalised, rebased
from app.text.tools.parser import ToolFormat
from app.text.tools.pythonic import MAX_KEY, is_of_key

ToolSpec = Mapping[str, object]  # in OpenAI's form
# Keys of a schema that asks for nothing, if it has no properties and requires none.
_SAYS_NOTHING = frozenset(
    {
        "type",
        "properties",
        "required",
        "title",
        "description",
        "$schema",
        "$id",
        "$comment",
        "$defs",
    }
)
# Keys at the root of a schema that a list of keyword arguments cannot follow.
_NOT_OF_KEYWORDS = frozenset(
    {"$ref", "anyOf", "oneOf", "allOf", "not", "if", "enum", "const", "minProperties",
     "maxProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies"}
)  # fmt: skip
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
_PYTHON_COMPACT = {"x-guidance": {"whitespace_flexible": False, "json_allowed_escapes": 'nrt"\\'}}


def tools_grammar(
    tool_format: ToolFormat,
    tools: Sequence[ToolSpec],
    *,
    names: Collection[str],
    parallel: bool,
    answer: Mapping[str, object] | None = None,
) -> str:
    """Return a grammar of one call of the named functions; with `parallel`, of one or more.

    With the schema of an `answer`, JSON that satisfies it may come in their place. Raises
    ValueError for a schema that cannot be enforced.
    """
    functions = [_function(tool) for tool in tools]
    chosen = [function for function in functions if function[0] in names]
    rules = [f"call: {' | '.join(f'f{i}' for i in range(len(chosen)))}"]
    for i, (name, schema) in enumerate(chosen):
        rules += _FUNCTION_RULES[tool_format](i, name, schema)
    opening, separator, closing = _AROUND[tool_format]
    more = f" ({_quoted(separator)} call)*" if parallel else ""
    parts = (
        [_quoted(opening)] * bool(opening) + [f"call{more}"] + [_quoted(closing)] * bool(closing)
    )
    if answer is not None:
        rules.append(f"answer: {_json(normalised(answer), _COMPACT)}")
    start = "start: calls" + " | answer" * (answer is not None)
    return "\n".join([start, "calls: " + " ".join(parts), *rules])


_AROUND: Mapping[ToolFormat, tuple[str, str, str]] = {
    "hermes": ("", "\n", ""),
    "llama3_json": ("", "; ", ""),
    "pythonic": ("[", ", ", "]"),
}


def _function(tool: ToolSpec) -> tuple[str, dict[str, object]]:
    function = tool["function"]
    assert isinstance(function, Mapping)
    schema = normalised(function.get("parameters") or {"type": "object", "properties": {}})
    name = str(function["name"])
    types = schema.setdefault("type", "object")
    if types != "object":
        if not (isinstance(types, list) and "object" in types):
            raise ValueError(f"the parameters of {name} are not those of an object")
        schema["type"] = "object"
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if isinstance(properties, dict) and isinstance(required, list):
        is_listed = all(isinstance(key, str) and key in properties for key in required)
        if is_listed and schema.keys() <= _SAYS_NOTHING:
            schema["additionalProperties"] = False  # a function takes what it lists
    return name, schema


def _hermes(i: int, name: str, schema: dict[str, object]) -> list[str]:
    head = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
    return [f"f{i}: {_quoted(head)} a{i} {_quoted(chr(125) + chr(10) + '</tool_call>')}",
            f"a{i}: {_json(schema, _COMPACT)}"]  # fmt: skip


def _llama_json(i: int, name: str, schema: dict[str, object]) -> list[str]:
    head = f'{{"name": {json.dumps(name)}, "parameters": '
    return [f'f{i}: {_quoted(head)} a{i} "}}"', f"a{i}: {_json(schema, _COMPACT)}"]


def _pythonic(i: int, name: str, schema: dict[str, object]) -> list[str]:
    """Keyword arguments in the schema's order: those required, then any of the others."""
    fields, required = _keywords(name, schema)
    must = [key for key in fields if key in required]
    may = [key for key in fields if key not in required]
    root = rebased(schema, "#/$defs/root")
    rules, names = [], {}
    for j, key in enumerate(fields):
        names[key] = f"k{i}_{j}"
        rules.append(f"{names[key]}: {_quoted(key + '=')} {_python_value(fields[key], root)}")
    for place, key in enumerate(may):  # m: what may follow, from one of the optional ones on
        rules.append(f'm{i}_{place}: (", " {names[key]})? m{i}_{place + 1}')
    rules.append(f'm{i}_{len(may)}: ""')
    if must:
        inner = ' ", " '.join(names[key] for key in must) + f" m{i}_0"
    else:  # begins with any of the optional ones, or has none
        starts = [f"{names[key]} m{i}_{place + 1}" for place, key in enumerate(may)]
        inner = f"({' | '.join(starts)})?" if starts else ""
    return [f'f{i}: {_quoted(name + "(")} {inner} ")"', *rules]


def _keywords(name: str, schema: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return the schemas of a function's keywords, and those that are required.

    Raises ValueError for what keywords cannot say or the grammar would not hold.
    """
    if beyond := sorted(schema.keys() & _NOT_OF_KEYWORDS):
        raise ValueError(f"{beyond[0]!r} in the parameters of {name} needs another call format")
    properties, listed = schema.get("properties"), schema.get("required")
    fields = dict(properties) if isinstance(properties, dict) else {}
    required = [key for key in listed if isinstance(key, str)] if isinstance(listed, list) else []
    for key in required:
        fields.setdefault(key, schema.get("additionalProperties", True))
    fields = {key: value for key, value in fields.items() if value is not False or key in required}
    for key, value in fields.items():
        if value is False:
            raise ValueError(f"nothing satisfies the parameter {key[:64]!r} of {name}")
        if not 0 < len(key) <= MAX_KEY or not all(map(is_of_key, key)):
            raise ValueError(f"the parameter {key[:64]!r} of {name} needs another call format")
    return fields, required


def _python_value(schema: object, root: object) -> str:
    """Return the rule of a keyword's value; `root` is where its references lead."""
    if not isinstance(schema, dict):
        schema = {}
    if schema.get("type") == "boolean" and "enum" not in schema and "const" not in schema:
        return '("True" | "False")'
    moved = rebased(schema, "#/$defs/root")
    assert isinstance(moved, dict)
    if moved != schema:  # it refers to something
        moved["$defs"] = {"root": root}
    return _json(moved, _PYTHON_COMPACT)


_FUNCTION_RULES = {"hermes": _hermes, "llama3_json": _llama_json, "pythonic": _pythonic}


def _json(schema: Mapping[str, object], options: Mapping[str, object]) -> str:
    return "%json " + json.dumps({**schema, **options}, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def tools_prompt(tool_format: ToolFormat, tools: Sequence[ToolSpec]) -> str:
    """Return what tells a model of tools if its template does not."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call functions. These are the functions, one JSON description a line:\n"
        f"<tools>\n{listed}\n</tools>\n"
        f"To call one, answer with nothing but\n{_EXAMPLES[tool_format]}\n"
        "with the function's name and arguments. If no function helps, answer in words."
    )


_EXAMPLES: Mapping[ToolFormat, str] = {
    "hermes": '<tool_call>\n{"name": "function", "arguments": {"key": "value"}}\n</tool_call>',
    "llama3_json": '{"name": "function", "parameters": {"key": "value"}}',
    "pythonic": '[function(key="value")]',
}


def call_text(tool_format: ToolFormat, name: str, arguments: str) -> str:
    """Return a call that was made earlier as the format writes it, for a template that cannot."""
    if tool_format == "hermes":
        return (
            f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        )
    if tool_format == "llama3_json":
        return f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}'
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = None
    pairs = values.items() if isinstance(values, dict) else ()
    return f"[{name}({', '.join(f'{key}={value!r}' for key, value in pairs)})]"
