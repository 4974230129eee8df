"""Demands compiled into constraints: what is accepted, what is refused, and at what cost."""

import asyncio
import json

import numpy as np
import pytest

from app.errors import InvalidRequest, Overloaded
from app.text.grammar import compiler as compiler_module
from app.text.grammar.compiler import GrammarCompiler
from app.text.grammar.schema import normalised
from app.text.grammar.spec import GrammarSpec, choice_spec, json_spec, text_spec
from model.step import ConstraintFailed
from tests.fake_engine import EOS, VOCAB, ByteTokenizer

NUM_IDS = VOCAB + 30  # ids beyond the tokenizer's, as padded checkpoints have


@pytest.fixture
def compiler():
    made = GrammarCompiler(ByteTokenizer(), vocab_size=NUM_IDS, end_token_ids={EOS, 259})
    yield made
    made.close()


def compiled(compiler, spec, count=1):
    return asyncio.run(compiler.constraints(spec, count, param="field"))


def allowed(constraint) -> set[int]:
    words = np.full(-(-NUM_IDS // 32), 0xFFFFFFFF, dtype=np.uint32)
    constraint.fill(memoryview(words))
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def admits(compiler, spec, text: str) -> bool:
    """Say whether a whole text, and then its end, may come of a demand."""
    (constraint,) = compiled(compiler, spec)
    for token_id in text.encode():
        if token_id not in allowed(constraint):
            return False
        constraint.accept([token_id])
    return constraint.is_complete or EOS in allowed(constraint)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (json_spec(PERSON, param="p"), '{"name":"Bo","age":3}', '{"name":"Bo"}'),
        (json_spec(PERSON, param="p"), '{"name":"é\\n","age":-3}', '{"name": "Bo","age":3}'),
        (json_spec(json.dumps(PERSON), param="p"), '{"name":"","age":0}', "[]"),
        (json_spec(PERSON, param="p", whitespace=" ?"), '{"name": "B", "age": 1}', "{\n}"),
        (json_spec({"type": "object"}, param="p"), '{"a":[1,{"b":null}]}', "1"),
        (json_spec(True, param="p"), "[true]", "nope"),
        (choice_spec(["yes", "no", "noon"], param="p"), "noon", "maybe"),
        (text_spec("regex", "[0-9]{4}-[0-9]{2}", param="p"), "2026-11", "2026-1"),
        (text_spec("grammar", 'start: "a" /b+/', param="p"), "abb", "ba"),
        (text_spec("grammar", 'root ::= "x" [yz]+', param="p"), "xyz", "y"),
    ],
)
def test_demand_admits_what_it_says_and_nothing_else(compiler, spec, good, bad):
    assert admits(compiler, spec, good)
    assert not admits(compiler, spec, bad)


def test_control_tokens_and_ids_without_meaning_are_never_allowed(compiler):
    (constraint,) = compiled(compiler, text_spec("regex", "(.|\\n)*", param="p"))
    ids = allowed(constraint)
    assert {EOS, 259} <= ids  # every end of text ends it
    assert not ids & {256, 258}
    assert not ids & set(range(VOCAB, NUM_IDS + 32))


def test_forced_ids_spell_what_must_follow_and_rollback_takes_them_back(compiler):
    (constraint,) = compiled(compiler, json_spec(PERSON, param="p"))
    forced = list(constraint.forced())
    assert bytes(forced) == b'{"name":"'
    assert constraint.num_allowed([*forced, ord("x")]) == len(forced) + 1
    assert constraint.num_allowed([ord("{"), ord("x")]) == 1
    constraint.accept(forced)
    constraint.rollback(len(forced))
    assert list(constraint.forced()) == forced


def test_constraints_of_one_demand_do_not_know_of_each_other(compiler):
    one, other = compiled(compiler, choice_spec(["ab", "cd"], param="p"), count=2)
    one.accept([ord("a")])
    assert allowed(other) == {ord("a"), ord("c")}
    assert list(one.forced()) == [ord("b")]


def test_constraint_knows_when_nothing_more_can_follow(compiler):
    (constraint,) = compiled(compiler, choice_spec(["ab"], param="p"))
    constraint.accept(b"a")
    assert not constraint.is_complete
    constraint.accept(b"b")
    assert constraint.is_complete


def test_id_that_was_not_allowed_fails_the_constraint(compiler):
    (constraint,) = compiled(compiler, choice_spec(["ab"], param="p"))
    with pytest.raises(ConstraintFailed, match="too complex"):
        constraint.accept([ord("x")])
    assert list(constraint.forced()) == []
    assert constraint.num_allowed([ord("a")]) == 0


def chain(length: int) -> str:
    rules = [f'a{i}: a{i + 1} a{i + 1} | "x"' for i in range(length)]
    return "\n".join(["start: a0", *rules, f'a{length}: "z"'])


def references(length: int) -> dict[str, object]:
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$defs": defs | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (text_spec("regex", "(a", param="p"), "unclosed group"),
        (text_spec("regex", "(?=a)b", param="p"), "look-around"),
        (text_spec("regex", "(" * 20_000 + ")" * 20_000, param="p"), "invalid regex"),
        (text_spec("grammar", "@@@", param="p"), "Expected name"),
        (text_spec("grammar", "root ::= " + "(" * 20_000, param="p"), "recursion"),
        (text_spec("grammar", "start: start", param="p"), "matches nothing"),
        (text_spec("grammar", chain(3000), param="p"), "too complex"),  # overflows a stack
        (json_spec(references(3000), param="p"), "too complex"),
        (json_spec({"$ref": "#"}, param="p"), "matches nothing"),
        (json_spec({"$ref": "http://example.org/x"}, param="p"), "retriev"),
        (json_spec({"type": "objekt"}, param="p"), "Invalid type"),
        (json_spec({"not": {}}, param="p"), "Unimplemented"),
        (json_spec({"enum": []}, param="p"), "nsatisfiable"),
        (json_spec(False, param="p"), "nothing satisfies"),
        (json_spec({"minimum": 5, "maximum": 3, "type": "integer"}, param="p"), "greater"),
    ],
)
def test_bad_or_hostile_demand_is_refused_and_the_next_one_served(compiler, spec, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        compiled(compiler, spec)
    assert caught.value.param == "field"
    assert len(caught.value.message) < 500
    assert admits(compiler, choice_spec(["ok"], param="p"), "ok")


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: json_spec(nested(100), param="p"), "levels deep"),
        (lambda: json_spec({"enum": list(range(2001))}, param="p"), "enum"),
        (lambda: json_spec({"x": [0] * 30_000}, param="p"), "values"),
        (lambda: json_spec("x" * 200_000, param="p"), "larger"),
        (lambda: json_spec("{", param="p"), "not valid JSON"),
        (lambda: json_spec("[" * 100_000, param="p"), "not valid JSON"),
        (lambda: json_spec("[]", param="p"), "must be a JSON schema"),
        (lambda: json_spec({"const": "x" * 200_000}, param="p"), "larger"),
        (lambda: text_spec("regex", "", param="p"), "empty"),
        (lambda: text_spec("regex", "é" * 100_000, param="p"), "larger"),
        (lambda: choice_spec([], param="p"), "1 to"),
        (lambda: choice_spec(["a", ""], param="p"), "empty choice"),
    ],
)
def test_demand_beyond_its_bounds_is_refused_before_it_is_compiled(make, message):
    with pytest.raises(InvalidRequest, match=message):
        make()


def test_one_demand_is_compiled_once_however_many_ask(compiler, monkeypatch):
    seen: list[GrammarSpec] = []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda spec: seen.append(spec) or compile_one(spec))
    spec = choice_spec(["a"], param="p")

    async def many():
        asked = [compiler.constraints(spec, 2, param="p") for _ in range(10)]
        return await asyncio.gather(*asked)

    assert len(asyncio.run(many())) == 10
    assert seen == [spec]


def test_cache_and_queue_are_bounded(compiler, monkeypatch):
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 4)
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 6)

    async def scenario():
        for number in range(10):
            await compiler.constraints(choice_spec([str(number)], param="p"), 1, param="p")
        assert len(compiler._cache) == 4
        flood = [
            compiler.constraints(choice_spec([f"x{n}"], param="p"), 1, param="p") for n in range(9)
        ]
        return await asyncio.gather(*flood, return_exceptions=True)

    results = asyncio.run(scenario())
    refused = [result for result in results if isinstance(result, BaseException)]
    assert [type(error) for error in refused] == [Overloaded] * 3


def test_model_without_an_end_of_text_says_so():
    compiler = GrammarCompiler(ByteTokenizer(), vocab_size=VOCAB, end_token_ids=())
    with pytest.raises(InvalidRequest, match="no end of text"):
        compiled(compiler, choice_spec(["a"], param="p"))


def test_formats_that_say_nothing_go_and_names_and_values_stay():
    schema = {
        "properties": {"format": {"type": "string", "format": "password"}},
        "const": {"format": "color"},
        "format": "uuid",
    }
    assert normalised(schema) == {
        "properties": {"format": {"type": "string"}},
        "const": {"format": "color"},
        "format": "uuid",
    }


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "string"}, {"type": "integer"}],
        [{"const": 1}, {"enum": [2, 3]}],
        [CAT, DOG],
        [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    ],
)
def test_one_of_branches_that_cannot_overlap_is_any_of(branches):
    schema = {"$defs": {"cat": CAT, "dog": DOG}, "oneOf": branches, "discriminator": {}}
    assert normalised(schema) == {"$defs": {"cat": CAT, "dog": DOG}, "anyOf": branches}


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "number"}, {"type": "integer"}],
        [{"type": "string"}, {"maxLength": 3}],
        [CAT, {**DOG, "required": []}],
        [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}],
        [{}] * 65,
    ],
)
def test_one_of_branches_that_may_overlap_is_refused(branches):
    with pytest.raises(ValueError, match="oneOf"):
        normalised({"$defs": {"loop": {"$ref": "#/$defs/loop"}}, "oneOf": branches})


def test_restarted_constraint_stands_where_its_tokens_lead_and_leaves_the_first_alone(compiler):
    (constraint,) = compiled(compiler, choice_spec(["abc", "abd", "x"], param="p"))
    constraint.accept(b"ab")
    again = constraint.restarted(list(b"a"))
    assert allowed(again) == {ord("b")}
    assert allowed(constraint) == {ord("c"), ord("d")}
    again.accept(b"bc")
    assert again.is_complete
    assert not constraint.is_complete
