"""`arriero bench`: its commands and their flags, under the names of `vllm bench`."""

import argparse
import json
import math
from pathlib import Path

from app.cli.command import load_options
from app.cli.options import add_model_options, add_weights_seed
from app.cli.values import count, positive, seconds
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
    add("--profile", action="store_true", help="what a decode step of each batch is made of, too")
    add("--card", type=Path, metavar="FILE",
        help="what `python -m model.bench` says of the card, to hold figures against")  # fmt: skip
    add_output_options(parser)
    add_model_options(parser)
    add_weights_seed(parser)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which server is put under which load."""
    add = parser.add_argument_group("server").add_argument
    add("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="http://127.0.0.1:8000")
    add("--endpoint", choices=["/v1/completions", "/v1/chat/completions"],
        default="/v1/completions", help="completions get token ids, chats words")  # fmt: skip
    add("--model", metavar="NAME", help="default: the first that the server names")
    add("--api-key", metavar="KEY", help="of the server (ARRIERO_API_KEY)")
    add("--extra-body", type=json_object, default={}, metavar="JSON",
        help="further fields of each request")  # fmt: skip
    add = parser.add_argument_group("load").add_argument
    add("--num-prompts", type=positive, default=100, metavar="N", help="requests (100)")
    add("--request-rate", type=rate, default=math.inf, metavar="R",
        help="requests a second; inf, the default: all at once")  # fmt: skip
    add("--burstiness", type=above_zero, default=1.0, metavar="B",
        help="1: Poisson; below: bursts; above: more even")  # fmt: skip
    add("--max-concurrency", type=positive, metavar="N", help="requests open at once")
    add("--num-warmups", type=count, default=1, metavar="N", help="requests before it counts (1)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals")
    add = parser.add_argument_group("requests").add_argument
    add("--random-input-len", type=positive, default=512, metavar="N", help="tokens (512)")
    add("--random-output-len", type=positive, default=128, metavar="N", help="tokens (128)")
    add("--random-range-ratio", type=part, default=0.0, metavar="R",
        help="lengths vary by this share, up and down (0)")  # fmt: skip
    add("--random-prefix-len", type=count, default=0, metavar="N",
        help="tokens that all prompts begin with, further ones (0)")  # fmt: skip
    add("--vocab-size", type=positive, default=30_000, metavar="N",
        help="ids of prompts are below this (30000)")  # fmt: skip
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="answers of full length; off where a server does not know the field")  # fmt: skip
    add("--temperature", type=float, metavar="T", help="0, the default: the likeliest token")
    add = parser.add_argument_group("figures").add_argument
    add("--metric-percentiles", type=percentiles, default=[90.0, 99.0], metavar="P,P",
        help="90,99")  # fmt: skip
    add("--goodput", nargs="+", type=objective, default=[], metavar="METRIC:MS",
        help="what a good request keeps to (ttft, tpot, e2el): ttft:200 tpot:25")  # fmt: skip
    add_output_options(parser)
    add("--plot", type=Path, metavar="FILE", help="write a picture of the run, as SVG")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add where figures go."""
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print JSON, not a table")
    add("--output-json", type=Path, metavar="FILE", help="write the figures here, too")


def run_engine(args: argparse.Namespace, environment: Environment) -> int:
    """Measure the engine without a server."""
    # Imported here: `--help` should not cost what torch does.
    from app.bench import engine

    model = args.model or args.model_path
    if model is None:
        args.fail("needs a model; with --load-format dummy, a folder with a config.json")
    return engine.run(args, load_options(args, model, environment))


def run_serve_bench(args: argparse.Namespace, environment: Environment) -> int:
    """Measure a server."""
    from app.bench import serve

    return serve.run(args, environment)


def rate(text: str) -> float:
    """Read requests a second; inf is one, too."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no rate")
    return value


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def part(text: str) -> float:
    """Read a share of 0 or more, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 1")
    return value


def percentiles(text: str) -> list[float]:
    """Read percentiles with commas between."""
    values = [float(each) for each in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 100")
    return values


def objective(text: str) -> tuple[str, float]:
    """Read a metric and its limit in milliseconds."""
    metric, _, limit = text.partition(":")
    if metric not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text}: METRIC is ttft, tpot or e2el")
    return metric, above_zero(limit)


def json_object(text: str) -> dict[str, object]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is no JSON object")
    return value
