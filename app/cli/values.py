"""Values of flags that have a form of their own; each raises ArgumentTypeError with one line."""

import argparse
import json
import math
import re

from app.engine.drafts import NgramSpeculation

MAX_SPECULATION = 64


def parse_speculation(text: str) -> NgramSpeculation:
    """Read vLLM's `--speculative-config`, of which the method ngram is supported."""
    fields = {"num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("method", None) != "ngram":
        raise argparse.ArgumentTypeError('needs "method": "ngram"')
    if unknown := sorted(set(values) - fields):
        raise argparse.ArgumentTypeError(f"has unknown fields: {', '.join(unknown)}")
    for name, value in values.items():
        if type(value) is not int or not 1 <= value <= MAX_SPECULATION:
            raise argparse.ArgumentTypeError(f"{name} must be from 1 to {MAX_SPECULATION}")
    numbers: dict[str, int] = values
    if "num_speculative_tokens" not in numbers:
        raise argparse.ArgumentTypeError("needs num_speculative_tokens")
    longest = numbers.get("prompt_lookup_max", numbers.get("prompt_lookup_min", 5))
    shortest = numbers.get("prompt_lookup_min", longest)
    if shortest > longest:
        raise argparse.ArgumentTypeError("prompt_lookup_min is more than prompt_lookup_max")
    return NgramSpeculation(
        num_speculative_tokens=numbers["num_speculative_tokens"],
        prompt_lookup_max=longest,
        prompt_lookup_min=shortest,
    )


def positive(text: str) -> int:
    """Read a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def count(text: str) -> int:
    """Read a whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seconds(text: str) -> float:
    """Read a number of seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def origin(text: str) -> str:
    """Read a site as browsers name it, or *."""
    if text != "*" and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", text):
        raise argparse.ArgumentTypeError(f"{text} is neither * nor like https://example.com")
    return text


def share(text: str) -> float:
    """Read a number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
