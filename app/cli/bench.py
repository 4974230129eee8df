"""`arriero bench`: its commands and their flags, under the names of `vllm bench`."""

import argparse
from pathlib import Path

from app.cli.command import load_options
from app.cli.options import add_model_options, add_weights_seed
from app.cli.values import positive, seconds
from app.settings import Environment


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how much the engine is asked for, and which model it runs."""
    add = parser.add_argument_group("work").add_argument
    add("--batch-size", nargs="+", type=positive, default=[1, 8, 32], metavar="N",
        help="sequences at once, one batch after the other (1 8 32)")  # fmt: skip
    add("--input-len", type=positive, default=512, metavar="N", help="tokens of a prompt (512)")
    add("--output-len", type=positive, default=512, metavar="N", help="tokens of an answer (512)")
    add("--prefill-len", nargs="*", type=positive, default=[], metavar="N",
        help="prompts of so many tokens, alone, up to the first token")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="0, the default: the likeliest token")
    add("--seconds", type=seconds, metavar="S", help="begin nothing after this time")
    add("--card", type=Path, metavar="FILE",
        help="what `python -m model.bench` says of the card, to hold figures against")  # fmt: skip
    add_output_options(parser)
    add_model_options(parser)
    add_weights_seed(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add where figures go."""
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print JSON, not a table")
    add("--output-json", type=Path, metavar="FILE", help="write the figures here, too")


def run_engine(args: argparse.Namespace, environment: Environment) -> int:
    """Measure the engine without a server."""
    from app.bench import engine

    model = args.model or args.model_path
    if model is None:
        args.fail("needs a model; with --load-format dummy, a folder with a config.json")
    return engine.run(args, load_options(args, model, environment))
