"""Group B: demands on the form of text that are made to break what compiles or reads them."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.battery.client import CHAT, COMPLETIONS, Server, streamed_ids
from tests.text.test_tool_calls import READERS, read

HELLO = [{"role": "user", "content": "a"}]
# What llguidance tries for longer than it is given: the intersection of forty patterns.
SLOW = {"allOf": [{"type": "string", "pattern": f"a.{{{number}}}b"} for number in range(40)]}
# What it compiles, but not at once: formats of fifteen hundred properties.
HEAVY = {
    "type": "object",
    "properties": {f"p{number}": {"type": "string", "format": "uri"} for number in range(1500)},
    "required": [f"p{number}" for number in range(1500)],
}


def demand(live: Server, **fields):
    """Ask for text of a form; it is given or refused, and never an internal error."""
    answer = live.complete("a", max_tokens=4, **fields)
    if answer.status != 200:
        answer.check_refusal()
    return answer


REGEXES = {
    "nested plus": "(a+)+b",
    "nested counts": "(a{1,1000}){1,1000}",
    "60,000 parentheses": "(" * 60_000 + ")" * 60_000,
    "60,000 open": "(" * 60_000,
    "anchors inside": "^+[a-z]$",
    "lookbehind": "(?<=a)b",
    "lookahead": "(?!a)b",
    "back reference": r"(a)\1",
    "count of a billion": "a{1000000000}",
    "backwards count": "a{5,1}",
    "unicode classes": r"(\p{L}{1,500}){1,500}",
    "exponential automaton": ".*a.{25}b",
    "wide alternation": "(" + "|".join("a" * number + "b" for number in range(400)) + "){1,200}",
    "nothing": "",
    "nothing matches": r"[^\s\S]",
    "null byte": "a\x00b",
}


def test_b01_grammar_that_grew_too_complex_is_refused_from_then_on(live):
    for _ in range(4):
        live.complete("a", max_tokens=4, guided_regex="a{1000000000}bc").check_refusal(400)


@pytest.mark.parametrize("name", REGEXES)
def test_b01_hostile_regex_is_compiled_or_refused(live, name):
    demand(live, guided_regex=REGEXES[name])
    demand(live, structured_outputs={"regex": REGEXES[name]})
    demand(live, guided_json={"type": "string", "pattern": REGEXES[name]})
    grammar = f"start: A\nA: /{REGEXES[name]}/"
    demand(live, guided_grammar=grammar)


@pytest.mark.parametrize("schema", [SLOW, HEAVY], ids=["given up", "compiled"])
def test_b01_b02_others_progress_while_a_hostile_schema_compiles(live, schema):
    """By order of events: a whole stream begins and ends before the hostile one is answered."""
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(demand, live, guided_json=dict(schema, title=str(schema)[:20]))
        num_streams = 0
        while not hostile.done():
            ids = streamed_ids(live.stream("witness", max_tokens=30, ignore_eos=True))
            assert len(ids) == 30
            assert live.get("/health", key=None).status == 200
            num_streams += not hostile.done()
    assert num_streams > 1


def nested(depth: int, wrap) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def branches(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "integer"}, {"type": "array", "items": schema}]}


NAMES = [f"p{number}" for number in range(10_000)]
SCHEMAS: dict[str, object] = {
    "itself": {"$ref": "#"},
    "itself twice": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "all of itself": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    "recursive definitions": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a tree": {
        "$defs": {"n": {"type": "object", "properties": {"l": {"$ref": "#/$defs/n"}}}},
        "$ref": "#/$defs/n",
    },
    "branches of branches": nested(8, branches),
    "any of 14 deep": nested(14, lambda inner: {"anyOf": [inner, {"type": "integer"}]}),
    "not of not": nested(20, lambda inner: {"not": inner}),
    "200,000 in an enum": {"enum": list(range(200_000))},
    "10,000 properties": {"properties": {name: {"type": "string"} for name in NAMES}},
    "10,000 required": {"type": "object", "required": NAMES},
    "a billion items": {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    "items of items": nested(
        6, lambda inner: {"type": "array", "minItems": 1000, "maxItems": 1000, "items": inner}
    ),
    "a billion characters": {"type": "string", "minLength": 10**9},
    "length of 300 digits": {"type": "string", "maxLength": 10**300},
    "backwards length": {"type": "string", "minLength": 5, "maxLength": 1},
    "tiny steps": {"type": "number", "multipleOf": 1e-300},
    "range of 300 digits": {"type": "integer", "minimum": 1, "maximum": 10**300},
    "wide range of floats": {"type": "number", "minimum": -1e308, "maximum": 1e308},
    "empty enum": {"enum": []},
    "product of properties": {
        "allOf": [
            {"anyOf": [{"properties": {f"x{i}{j}": {"type": "string"}}} for j in range(3)]}
            for i in range(12)
        ]
    },
    "patterns as names": {"patternProperties": {"(a{1,1000}){1,1000}": {}, "^(": {}}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_b02_hostile_schema_is_compiled_or_refused(live, name):
    schema = SCHEMAS[name]
    demand(live, guided_json=schema)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = live.chat("a", response_format=form)
    if answer.status != 200:
        answer.check_refusal()


@pytest.mark.parametrize("key", ["items", "not", "properties", "$defs"])
def test_b02_schema_5000_deep_is_refused(live, key):
    opening = f'{{"{key}": ' if key in ("items", "not") else f'{{"{key}": {{"a": '
    closing = "}" if key in ("items", "not") else "}}"
    schema = opening * 5000 + "{}" + closing * 5000
    live.post(COMPLETIONS, f'{{"prompt": "a", "guided_json": {schema}}}'.encode()).check_refusal()
    live.complete("a", guided_json=schema).check_refusal()  # as a text in the text


def test_b03_reference_to_elsewhere_is_refused_and_not_fetched(live, trap):
    targets = [trap.url, f"{trap.url}/schema.json#/$defs/a", "file:///etc/passwd", "../x.json"]
    for target in [*targets, "//127.0.0.1/x", "ftp://127.0.0.1/x", "urn:x:y"]:
        for schema in (
            {"$ref": target},
            {"properties": {"a": {"$ref": target}}, "required": ["a"]},
            {"$id": target, "$ref": "other.json"},
            {"$dynamicRef": target},
        ):
            answer = live.complete("a", max_tokens=2, guided_json=schema)
            answer.check_refusal(400)
        demand(live, guided_json={"$schema": target, "type": "string"})
    threading.Event().wait(0.05)  # a fetch in the background would have begun
    assert trap.num_connections() == 0


MALFORMED: dict[str, object] = {
    "type of nothing": {"type": "something"},
    "type of a number": {"type": 5},
    "types of numbers": {"type": [5]},
    "type of an object": {"type": {}},
    "no types": {"type": []},
    "pattern of a number": {"type": "string", "pattern": 5},
    "pattern of an object": {"type": "string", "pattern": {}},
    "pattern of null": {"type": "string", "pattern": None},
    "broken pattern": {"type": "string", "pattern": "("},
    "properties as a list": {"type": "object", "properties": []},
    "property of a number": {"type": "object", "properties": {"a": 5}, "required": ["a"]},
    "items of a text": {"type": "array", "items": "string"},
    "required of a text": {"type": "object", "required": "a"},
    "required of numbers": {"type": "object", "required": [5]},
    "enum of a text": {"enum": "abc"},
    "length of a text": {"type": "string", "minLength": "5"},
    "negative length": {"type": "string", "minLength": -1},
    "any of an object": {"anyOf": {}},
    "any of nothing": {"anyOf": []},
    "reference of a number": {"$ref": 5},
    "reference to nothing": {"$ref": "#/$defs/nope"},
    "unknown format": {"type": "string", "format": "something"},
    "null schema": {"properties": {"a": None}},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_b04_malformed_schema_costs_its_request_alone(live, name):
    schema = MALFORMED[name]
    demand(live, guided_json=schema)
    function = {"name": "f", "parameters": schema}
    for choice in ("auto", "required"):
        answer = live.chat(
            "a", tools=[{"type": "function", "function": function}], tool_choice=choice
        )
        if answer.status != 200:
            answer.check_refusal()


def tool(name: object, **fields: object) -> dict:
    return {"type": "function", "function": {"name": name, **fields}}


def test_b05_bad_tools_are_refused(live):
    for tools in (
        [tool(f"f{number}") for number in range(129)],
        [tool("f"), tool("f")],
        [tool("")],
        [tool("x" * 65)],
        [tool("a b")],
        [tool("../x")],
        [tool("f\n")],
        [tool("é")],
        [tool(5)],
        [{"type": "function"}],
        [{"type": "code_interpreter"}],
        [tool("f", parameters=[])],
        [tool("f", parameters="{}")],
        [5],
        5,
        {},
    ):
        live.chat("a", tools=tools).check_refusal(param="tools")
    live.chat("a", tools=[tool("f")], tool_choice={"type": "function"}).check_refusal()
    named = {"type": "function", "function": {"name": "g"}}
    live.chat("a", tools=[tool("f")], tool_choice=named).check_refusal(param="tool_choice")


def test_b05_huge_tools_are_refused(live):
    body = {"messages": HELLO, "tools": [tool("f", description="x" * (5 << 20))]}
    assert live.post(CHAT, body).check_refusal(413)["code"] == "payload_too_large"
    body["tools"] = [tool("f", description="x" * (3 << 16))]
    assert live.post(CHAT, body).check_refusal()["code"] == "context_length_exceeded"
    wide = {"properties": {name: {"type": "string"} for name in NAMES}, "required": NAMES}
    live.chat("a", tools=[tool("f", parameters=wide)], tool_choice="required").check_refusal()


def test_b06_ever_new_schemas_fill_neither_memory_nor_disk(live, full, tmp_path):
    count = 5000 if full else 200

    def ask(number: int) -> None:
        schema = {"type": "object", "properties": {f"p{number}": {"enum": [number]}}}
        assert live.complete("a", max_tokens=2, guided_json=schema).status == 200

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(count // 2)))
        half = live.vitals().resident
        list(pool.map(ask, range(count // 2, count)))
    assert live.vitals().resident < half + (24 << 20)


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize("unit", ["{", "<", "[", '"', "<tool_call>", "\\", "{<", "<|python_tag|>"])
def test_b07_megabyte_of_a_models_nonsense_is_read_in_linear_time(tool_format, unit):
    def num_calls(size: int) -> int:
        counted = 0

        def count_call(_frame, event, _arg) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        pieces = [unit * 64] * (size // (64 * len(unit)))
        sys.setprofile(count_call)
        try:
            content, calls = read(tool_format, pieces)
        finally:
            sys.setprofile(None)
        assert not [call for call in calls if call[2]]
        assert len(content) <= size
        return counted

    assert num_calls(16_000) < 4.5 * num_calls(4_000) + 1000


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize("unit", ["{", "<", "nonsense ", "}", "</tool_call>", "\\"])
def test_b07_nonsense_that_is_no_call_comes_back_as_text(tool_format, unit, full):
    text = unit * ((1_000_000 if full else 50_000) // len(unit))
    pieces = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    content, calls = read(tool_format, pieces)
    assert calls == []
    assert content.strip() == text.strip()


def test_b07_model_that_writes_nonsense_is_served_with_its_text(live):
    """The toy knows no tool: whatever it says is content, streamed or not."""
    answer = live.chat("a", tools=[tool("f")], max_tokens=60)
    message = answer.json["choices"][0]["message"]
    assert message["content"]
    assert not message.get("tool_calls")


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def test_b08_schema_cut_by_length_says_so_with_a_valid_beginning(live):
    whole = live.complete("a", max_tokens=200, guided_json={"const": {"a": [1, 2, "three"]}})
    text = whole.json["choices"][0]["text"]
    assert json.loads(text) == {"a": [1, 2, "three"]}
    assert whole.json["choices"][0]["finish_reason"] == "stop"
    for length in (1, 3, 6):
        choice = live.complete(
            "a", max_tokens=length, guided_json={"const": {"a": [1, 2, "three"]}}
        ).json["choices"][0]
        assert choice["finish_reason"] == "length"
        assert text.startswith(choice["text"])


def test_b08_stop_string_inside_a_schema_cuts_it(live):
    answer = live.complete("a", max_tokens=100, guided_json=PERSON, stop=['"age"'], seed=1)
    choice = answer.json["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    assert '"age"' not in choice["text"]
    forced = live.complete("a", max_tokens=100, guided_choice=["yes and no"], stop=[" and"])
    assert forced.json["choices"][0]["text"] == "yes"


def test_b08_masks_that_exclude_each_other_are_an_error_of_that_request(live):
    for fields in (
        {"allowed_token_ids": [70]},
        {"min_tokens": 4},
        {"logit_bias": {str(number): -100 for number in range(5, 300)}},
        {"bad_words": ["yes"]},
    ):
        answer = live.complete("a", max_tokens=4, guided_choice=["yes"], **fields)
        assert answer.status in (200, 400, 500)
        if answer.status != 200:
            answer.check_refusal((400, 500))
