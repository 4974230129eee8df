"""A demand as llguidance's own grammar text. No vocabulary, no compilation."""

import json

from llguidance import LLMatcher, LLParserLimits, grammar_from

from app.text.grammar.schema import normalised
from app.text.grammar.spec import GrammarSpec


def grammar_of(spec: GrammarSpec) -> str:
    """Return the text that a matcher is made from. Raises ValueError or RecursionError."""
    match spec.kind:
        case "json_schema":
            schema = normalised(json.loads(spec.text))
            if spec.whitespace is None:
                return LLMatcher.grammar_from_json_schema(
                    schema, overrides={"whitespace_flexible": False}
                )
            return LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": spec.whitespace}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "lark":
            return LLMatcher.grammar_from_lark(spec.text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {_alternatives(spec.text)}")
        case "grammar":
            return grammar_from("grammar", spec.text)


def parser_limits() -> LLParserLimits:
    """Return the bounds of one grammar; a state of its lexer takes 1 to 2 kB."""
    return LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)


def _alternatives(choices: str) -> str:
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(choices))
