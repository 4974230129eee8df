"""From the fields of a request to the form that its text must have, in any of the wire's ways."""

from app.errors import InvalidRequest
from app.protocol.common import ResponseFormat, SamplingFields
from app.serving.context import ServingContext
from app.text.grammar.spec import (
    ANY_OBJECT,
    GrammarSpec,
    choice_spec,
    json_spec,
    text_spec,
)
from model.step import TokenConstraint

Demand = tuple[str, GrammarSpec]  # the field that makes it, and what it says


def demand_of(fields: SamplingFields) -> Demand | None:
    """Return what a request demands, if anything. Raises InvalidRequest for two demands."""
    demands = [*_response_format(fields.response_format), *_structured(fields), *_guided(fields)]
    if len(demands) > 1:
        names = " and ".join(f"'{name}'" for name, _ in demands[:2])
        raise InvalidRequest(f"{names} exclude each other.", param=demands[1][0])
    return demands[0] if demands else None


async def compile_demand(
    context: ServingContext, demand: Demand | None, count: int
) -> tuple[TokenConstraint, ...]:
    """Return a constraint for each of `count` sequences; none if nothing is demanded."""
    if demand is None:
        return ()
    param, spec = demand
    return await context.grammars.constraints(spec, count, param=param)


def _response_format(form: ResponseFormat | None) -> list[Demand]:
    if form is None or form.type == "text":
        return []
    param = "response_format"
    if form.type == "json_object":
        return [(param, json_spec(ANY_OBJECT, param=param))]
    if form.json_schema is None:
        raise InvalidRequest("'response_format.json_schema' is missing.", param=param)
    schema = form.json_schema.schema_
    return [(param, json_spec(ANY_OBJECT if schema is None else schema, param=param))]


def _structured(fields: SamplingFields) -> list[Demand]:
    wanted, param = fields.structured_outputs, "structured_outputs"
    if wanted is None:
        return []
    white = wanted.whitespace_pattern
    found: list[GrammarSpec] = []
    if wanted.json_ is not None:
        found.append(json_spec(wanted.json_, param=param, whitespace=white))
    if wanted.json_object:
        found.append(json_spec(ANY_OBJECT, param=param, whitespace=white))
    if wanted.regex is not None:
        found.append(text_spec("regex", wanted.regex, param=param))
    if wanted.choice is not None:
        found.append(choice_spec(wanted.choice, param=param))
    if wanted.grammar is not None:
        found.append(text_spec("grammar", wanted.grammar, param=param))
    if len(found) != 1:
        raise InvalidRequest(
            "'structured_outputs' must have exactly one of json, json_object, regex, choice and "
            "grammar.",
            param=param,
        )
    return [(param, found[0])]


def _guided(fields: SamplingFields) -> list[Demand]:
    """Return demands under the older names of vLLM, and one that SGLang and llama.cpp share."""
    white = fields.guided_whitespace_pattern
    found: list[Demand] = []
    for param, schema in (("guided_json", fields.guided_json), ("json_schema", fields.json_schema)):
        if schema is not None:
            found.append((param, json_spec(schema, param=param, whitespace=white)))
    if fields.guided_regex is not None:
        spec = text_spec("regex", fields.guided_regex, param="guided_regex")
        found.append(("guided_regex", spec))
    if fields.guided_choice is not None:
        spec = choice_spec(fields.guided_choice, param="guided_choice")
        found.append(("guided_choice", spec))
    if fields.guided_grammar is not None:
        spec = text_spec("grammar", fields.guided_grammar, param="guided_grammar")
        found.append(("guided_grammar", spec))
    return found
