"""Tool calls read out of text, however it is cut; and grammars whose every text is read back."""

import json
import random
import sys

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from app.text.tools.events import CallArguments, CallEnd, CallStart, Content
from app.text.tools.grammar import call_text, tools_grammar
from app.text.tools.parser import READERS, detect_format
from app.text.tools.reader import MAX_HELD

NAMES = frozenset({"get_weather", "add", "ping"})


def read(tool_format: str, pieces) -> tuple[str, list[tuple[str, str, bool]]]:
    """Return the content, and of each call its name, arguments and whether it ended."""
    reader = READERS[tool_format](NAMES)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, "", False])
            case CallArguments(index, text):
                calls[index][1] += text
            case CallEnd(index):
                calls[index][2] = True
    return content, [tuple(call) for call in calls]


W = '{"city": "Paris \\"}{[", "n": [1, {"a": null}]}'
CASES = [
    ("hermes", "Hello", "Hello", []),
    ("hermes", "  a < b <tool_calls> \n", "  a < b <tool_calls> \n", []),
    (
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {W}}}\n</tool_call>',
        "Let me see.",
        [("get_weather", W, True)],
    ),
    (
        "hermes",
        '<tool_call>{"name":"ping","arguments":{}}</tool_call>\n'
        '<tool_call>{"arguments": {"a": 1, "b": 2}, "name": "add"}</tool_call> done ',
        "done ",
        [("ping", "{}", True), ("add", '{"a": 1, "b": 2}', True)],
    ),
    ("hermes", '<tool_call>{"name":"ping"}</tool_call>', "", [("ping", "{}", True)]),
    ("hermes", '<tool_call>{"name":"ping","arguments":null}', "", [("ping", "{}", True)]),
    (
        "hermes",
        '<tool_call>{"name":"add","arguments":"{\\"a\\":1}"}</tool_call>',
        "",
        [("add", '{"a":1}', True)],
    ),
    ("hermes", '<tool_call>{"name":"add","arguments":{"a":', "", [("add", '{"a":', False)]),
    (
        "hermes",
        '<tool_call>{"name":"add","arguments":{"a":1},"parameters":{"b":2}}</tool_call>',
        "",
        [("add", '{"a":1}', True)],
    ),
    ("hermes", '<tool_call>{"name":"add","arguments":[1]}', "", [("add", "[1]", True)]),
    ("hermes", '<tool_call>{"name":"add","arguments":"a"}', "", [("add", '"a"', True)]),
    (
        "hermes",  # the outer brace forgotten
        '<tool_call>{"name":"add","arguments":{"a":1}</tool_call> <tool_call>{"name":"ping"}x',
        "x",
        [("add", '{"a":1}', True), ("ping", "{}", True)],
    ),
    (
        "hermes",
        '<tool_call>{"name":"add","arguments":{"a":1} garbage',
        "garbage",
        [("add", '{"a":1}', False)],
    ),
    (
        "hermes",
        '<tool_call>{<tool_call>{"name":"ping"}</tool_call>',
        "<tool_call>{",
        [("ping", "{}", True)],
    ),
    ("hermes", '<tool_call> {"name":"rm"} </tool_call>x', None, []),
    ("hermes", "<tool_call> no </tool_call>", "<tool_call> no </tool_call>", []),
    ("hermes", "<tool_call><tool_call>\n", "<tool_call><tool_call>\n", []),
    ("hermes", '<tool_call>{"name": pi', '<tool_call>{"name": pi', []),
    ("hermes", '{"name":"ping","arguments":{}}', '{"name":"ping","arguments":{}}', []),
    (
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {W}}}',
        "",
        [("get_weather", W, True)],
    ),
    (
        "llama3_json",
        'Sure.<|python_tag|>{"name": "add", "arguments": {"a": 1}}; {"name": "ping"}',
        "Sure.",
        [("add", '{"a": 1}', True), ("ping", "{}", True)],
    ),
    (
        "llama3_json",
        '[{"name": "add", "parameters": {"a": 1}}, {"name": "ping", "parameters": {}}]',
        "",
        [("add", '{"a": 1}', True), ("ping", "{}", True)],
    ),
    ("llama3_json", 'A {"name": "ping"}', 'A {"name": "ping"}', []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"name": "Bob"}', '{"name": "Bob"}', []),
    ("llama3_json", '{"name": "ping"} and so on', "and so on", [("ping", "{}", True)]),
    ("llama3_json", '[{"name": "ping"}] and so on', "and so on", [("ping", "{}", True)]),
    ("llama3_json", '{"name": "ping"}; {"name": "rm"}', '{"name": "rm"}', [("ping", "{}", True)]),
    ("llama3_json", '\n [1, 2] ', "\n [1, 2] ", []),
    (
        "pythonic",
        "[get_weather(city='It\\'s \"x\" \\u00e9', n=[1, -2.5, {'a': None,}], b=True), ping()]",
        "",
        [
            (
                "get_weather",
                '{"city":"It\'s \\"x\\" \\u00e9","n":[1,-2.5,{"a":null}],"b":true}',
                True,
            ),
            ("ping", "{}", True),
        ],
    ),
    (
        "pythonic",
        "<|python_start|>[ add( a = 1 , b=.5 ) ]<|python_end|>",
        "",
        [("add", '{"a":1,"b":0.5}', True)],
    ),
    (
        "pythonic",
        "[add(a=(1, 2), b={'k': false})]",
        "",
        [("add", '{"a":[1,2],"b":{"k":false}}', True)],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[see this](http://x)", "[see this](http://x)", []),
    ("pythonic", "[rm(a=1)]", "[rm(a=1)]", []),
    ("pythonic", "[add(1, 2)]", "[add(1, 2)]", []),
    ("pythonic", "I say [ping()]", "I say [ping()]", []),
    ("pythonic", "[add(a b=1)]", "[add(a b=1)]", []),
    ("pythonic", "[add(user-id=1, $top=2)]", "", [("add", '{"user-id":1,"$top":2}', True)]),
    ("pythonic", "[add(a=1e999)]", "", [("add", '{"a":1e999}', True)]),
    ("pythonic", "[add(a=1", "", [("add", '{"a":1', False)]),
    ("pythonic", "[add(a=1 2)] x", "2)] x", [("add", '{"a":1', False)]),
    ("pythonic", "[add(a=[1,,2])]", ",2])]", [("add", '{"a":[1', False)]),
    ("pythonic", "[add(a={'x' 'y': 1})]", "'y': 1})]", [("add", '{"a":{"x"', False)]),
    ("pythonic", "[add(a='\\u+0ff')]", "\\u+0ff')]", [("add", '{"a":"', False)]),
    ("pythonic", "[add(a='\\UFFFFFFFF')]", "\\UFFFFFFFF')]", [("add", '{"a":"', False)]),
    ("pythonic", "[add(a=NaN)]", "NaN)]", [("add", '{"a":', False)]),
    ("pythonic", "[ping(), rm()]", "rm()]", [("ping", "{}", True)]),
    (
        "pythonic",
        "[add(a=__import__('os'))]",
        "__import__('os'))]",
        [("add", '{"a":', False)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_and_content_are_told_apart_at_any_split(tool_format, text, content, calls):
    whole = read(tool_format, [text])
    assert whole[1] == calls
    if content is not None:
        assert whole[0] == content
    assert read(tool_format, text) == whole  # one character at a time
    for place in range(len(text)):
        assert read(tool_format, [text[:place], text[place:]]) == whole


PIECES = (
    "<tool_call>", "</tool_call>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "{", "}",
    "[", "]", "(", ")", '"name"', ":", '"ping"', '"add"', "ping", "add(", "a=", "'x'", '"', "\\",
    ",", " ", "\n", "1", "True", '{"name": "add", "arguments": {"a": 1}}', "[add(a=1)]",
    "é", ";", "<",
)  # fmt: skip


@pytest.mark.parametrize("tool_format", READERS)
@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=30), seed=st.integers(0, 1000))
def test_any_text_reads_the_same_at_any_split_and_loses_nothing(tool_format, parts, seed):
    text = "".join(parts)
    whole = read(tool_format, [text])
    rng = random.Random(seed)
    pieces, place = [], 0
    while place < len(text):
        size = rng.randint(1, 9)
        pieces.append(text[place : place + size])
        place += size
    assert read(tool_format, pieces) == whole
    content, calls = whole
    if not calls:
        assert content == text
    for _, arguments, is_whole in calls:
        if is_whole and tool_format == "pythonic":
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", "<tool_call>{", '{"name": "', "[", "[add(a=", "[[[", "<", " ", "<|python_tag|>",
     '{"a":[', '{"name":"add","parameters":{"', "[add(a='"],
)  # fmt: skip
def test_hostile_text_takes_linear_time(tool_format, unit):
    def num_calls(count: int) -> int:
        """Count the function calls that reading takes."""
        counted = 0

        def count_call(_frame, event, _arg):
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            read(tool_format, [unit * count])
        finally:
            sys.setprofile(None)
        return counted

    assert num_calls(4000) < 4.5 * num_calls(1000)


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize(
    "start", ["", "x", "<tool_call>", '{"name": "', "[", "[add(", "[add(a=1, b", '{"name": "add",']
)
@pytest.mark.parametrize("unit", [" ", "b", "\n"])
def test_what_is_held_back_is_bounded(tool_format, start, unit):
    reader = READERS[tool_format](NAMES)
    reader.push(start + unit * 2 * MAX_HELD)
    late = reader.push(unit * MAX_HELD) + reader.finish()
    held = sum(len(event.text) for event in late if isinstance(event, Content | CallArguments))
    assert held <= 2 * MAX_HELD + len(start) + 1


def test_format_is_found_in_a_template():
    assert detect_format(None) == "hermes"
    assert detect_format("{{ '<tool_call>' }}") == "hermes"
    assert detect_format('Respond in the format {"name": ..., "parameters": ...}') == "llama3_json"
    assert detect_format("[func_name1(params_name1=params_value1)]") == "pythonic"
    assert detect_format("{{ message.content }}") == "hermes"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"enum": ["C", "F"]},
                    "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
                    "exact": {"type": "boolean"},
                },
                "required": ["city", "exact"],
                "additionalProperties": False,
                "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 30}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number", "maximum": 99}, "b": {"type": "null"}},
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "ping"}},
]


class _Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"</s>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


VOCABULARY = LLTokenizer(TokenizerWrapper(_Bytes()))


def random_text(grammar: str, rng: random.Random) -> str:
    """A text of a grammar, letter by letter, that ends as soon as it may."""
    matcher = LLMatcher(VOCABULARY, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    text = bytearray()
    for _ in range(3000):
        if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.5):
            return text.decode("utf-8", "replace")
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        plain = [i for i in np.flatnonzero(bits).tolist() if 32 <= i < 127 or i == 10]
        char = rng.choice(plain)
        matcher.consume_token(char)
        text.append(char)
    raise AssertionError("the grammar does not let its text end")


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize("parallel", [False, True])
def test_text_of_a_grammar_is_read_back_as_calls_that_validate(tool_format, parallel, full):
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    grammar = tools_grammar(tool_format, TOOLS, names=NAMES, parallel=parallel)
    rng = random.Random(1)
    seen = set()
    for _ in range(300 if full else 40):
        text = random_text(grammar, rng)
        content, calls = read(tool_format, [text])
        assert content == ""
        assert calls
        assert parallel or len(calls) == 1
        for name, arguments, is_whole in calls:
            assert is_whole
            jsonschema.validate(json.loads(arguments), schemas[name])
            seen.add(name)
    assert seen == NAMES


INTEGER = {"type": "integer"}
AWKWARD = [
    {"type": "object", "properties": {"user-id": INTEGER, "$top": INTEGER}, "required": ["$top"],
     "additionalProperties": False},
    {"type": "object", "required": ["x"]},
    {"type": "object", "properties": {"x": INTEGER}, "required": ["x", "y"]},
    {"type": "object", "properties": {}, "required": []},
    {"type": ["object", "null"], "properties": {"x": False, "y": True}},
    {"type": "object", "additionalProperties": INTEGER},
    {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]},
    {"type": "object", "properties": {"x": INTEGER, "more": {"$ref": "#"}}, "required": ["x"],
     "additionalProperties": False},
    {"type": "object", "properties": {"x": INTEGER, "y": {"$ref": "#/properties/x"}},
     "required": ["y"], "additionalProperties": False},
    {"type": "object", "properties": {f"k{i}": INTEGER for i in range(200)}},
]  # fmt: skip
BEYOND_KEYWORDS = [
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"x": INTEGER},
                                          "required": ["x"], "additionalProperties": False}}},
    {"anyOf": [{"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"],
                "additionalProperties": False}]},
    {"type": "object", "properties": {"a=": INTEGER}, "required": ["a="]},
]  # fmt: skip


def check_forced_calls(tool_format, schema):
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    grammar = tools_grammar(tool_format, [tool], names=NAMES, parallel=False)
    rng = random.Random(4)
    for _ in range(10):
        content, calls = read(tool_format, [random_text(grammar, rng)])
        assert content == ""
        assert [is_whole for _, _, is_whole in calls] == [True]
        jsonschema.validate(json.loads(calls[0][1]), schema)


@pytest.mark.parametrize("tool_format", READERS)
@pytest.mark.parametrize("schema", AWKWARD)
def test_forced_call_validates_against_an_awkward_schema(tool_format, schema):
    check_forced_calls(tool_format, schema)


@pytest.mark.parametrize("schema", BEYOND_KEYWORDS)
def test_schema_that_keywords_cannot_follow_is_refused_in_pythonic_alone(schema):
    check_forced_calls("hermes", schema)
    check_forced_calls("llama3_json", schema)
    with pytest.raises(ValueError, match="needs another call format"):
        check_forced_calls("pythonic", schema)


@pytest.mark.parametrize("tool_format", READERS)
def test_parameters_that_are_no_object_are_refused(tool_format):
    with pytest.raises(ValueError, match="not those of an object"):
        check_forced_calls(tool_format, {"type": "string"})


@pytest.mark.parametrize(
    ("tool_format", "good", "bad"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "add", "arguments": {"a":1,"b":null}}\n</tool_call>',
            [
                '<tool_call>\n{"name": "rm"',
                '<tool_call>\n{"name": "add", "arguments": {"a":"',
                '<tool_call>\n{"name": "add", "arguments": {  ',
                "Sure",
            ],
        ),
        (
            "llama3_json",
            '{"name": "ping", "parameters": {}}',
            ['{"name": "ping", "parameters": {"', '{"name": "ping", "parameters": {}} ', "{ "],
        ),
        (
            "pythonic",
            '[get_weather(city="é\\n", exact=True, unit="C", days=[1,2])]',
            ["[get_weather(unit", "[get_weather(city='", "[ping(x", "[]", "[ping()] "],
        ),
    ],
)
def test_grammar_takes_a_good_call_whole_and_refuses_bad_ones(tool_format, good, bad):
    grammar = tools_grammar(tool_format, TOOLS, names=NAMES, parallel=False)

    def num_taken(text: str) -> tuple[int, bool]:
        matcher = LLMatcher(VOCABULARY, LLMatcher.grammar_from_lark(grammar), log_level=0)
        taken = matcher.try_consume_tokens(list(text.encode()))
        return taken, matcher.is_accepting()

    assert num_taken(good) == (len(good.encode()), True)
    for text in bad:
        assert num_taken(text)[0] < len(text.encode())


@pytest.mark.parametrize("tool_format", READERS)
def test_grammar_names_only_the_functions_that_may_be_called(tool_format):
    grammar = tools_grammar(tool_format, TOOLS, names={"ping"}, parallel=False)
    rng = random.Random(2)
    for _ in range(5):
        _, calls = read(tool_format, [random_text(grammar, rng)])
        assert [name for name, _, _ in calls] == ["ping"]


@pytest.mark.parametrize("tool_format", READERS)
def test_earlier_call_written_as_text_reads_back(tool_format):
    arguments = '{"a": 1, "b": "it\'s", "c": [true, null]}'
    _, calls = read(tool_format, [call_text(tool_format, "add", arguments)])
    assert calls[0][0] == "add"
    assert json.loads(calls[0][1]) == json.loads(arguments)
