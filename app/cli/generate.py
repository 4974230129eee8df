"""`arriero generate`: continue a text on standard output."""

import argparse
import json
import sys
from pathlib import Path

from app.cli.connection import Json, connect
from app.cli.terminal import shown
from app.settings import Environment

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


def run(args: argparse.Namespace, environment: Environment) -> int:
    """Continue the prompt, or what comes through standard input; 130 if it was stopped."""
    wanted = args.model_path or ""
    if len(wanted.split()) > 1 and not Path(wanted).exists():
        args.fail(f"{wanted!r} is no model: a text goes behind --prompt")
    if args.prompt is None and sys.stdin.isatty():
        args.fail("needs --prompt TEXT, or a text through standard input")
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if not prompt:
        args.fail("the prompt is empty: it goes behind --prompt, or through standard input")
    body: Json = {"prompt": prompt, **sampling_fields(args)}
    with connect(args, environment) as connection:
        if args.json:
            sys.stdout.write(json.dumps(connection.post("/v1/completions", body)) + "\n")
            return 0
        is_whole = connection.stream("/v1/completions", body, _write_text)
    sys.stdout.write("\n")
    return 0 if is_whole else 130


def sampling_fields(args: argparse.Namespace) -> Json:
    """Return the request's fields for the flags that were given; the server has the defaults."""
    given = {name: getattr(args, name) for name in SAMPLING}
    return {name: value for name, value in given.items() if value is not None}


def _write_text(event: Json) -> None:
    for choice in choices_of(event):
        text = choice.get("text")
        if isinstance(text, str):
            sys.stdout.write(shown(text))
            sys.stdout.flush()


def choices_of(event: Json) -> list[Json]:
    """Return the choices of an event that are objects."""
    choices = event.get("choices")
    found = choices if isinstance(choices, list) else []
    return [choice for choice in found if isinstance(choice, dict)]
