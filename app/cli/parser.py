"""The tree of commands: `arriero serve`, `arriero info` and so on; a test freezes its flags.

Each command is a parser with a function to run, `(args, environment) -> exit code`. What those
functions need is imported when they run: `--help` should not cost the second that torch takes.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from app.cli.bench import (
    add_engine_options,
    add_serve_options,
    run_engine,
    run_serve_bench,
)
from app.cli.command import Command, command_of
from app.cli.options import (
    add_model_options,
    add_server_options,
    add_talk_options,
    add_weights_seed,
)
from app.logs import set_up_logging
from app.settings import Environment

Run = Callable[[argparse.Namespace, Environment], int]
"""Run a command; returns the exit code. Raises ModelError for what the user got wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and a next step, not all flags there are."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong is not None:
            message += _meant(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` says what there is\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(prog="arriero", description="Serve LLaMA-family models, or talk to one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_command = partial(_add_command, commands)

    serve = add_command("serve", run_serve, "load a model and serve OpenAI's API")
    add_model_options(serve)
    add_weights_seed(serve)
    add_server_options(serve)
    info = add_command("info", run_info, "say what would be loaded, and the memory plan")
    add_model_options(info)
    add_weights_seed(info)
    generate = add_command("generate", run_generate, "continue a text on standard output")
    generate.add_argument("--prompt", metavar="TEXT", help="default: standard input")
    generate.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    chat = add_command("chat", run_chat, "talk to a model at the terminal")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this alone, and leave")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told to be")
    for talk in (generate, chat):
        add_talk_options(talk)
        add_model_options(talk)
    description = "time a server, or the engine alone"
    bench = commands.add_parser("bench", help=description, description=description)
    benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
    load = _add_command(benches, "serve", run_serve_bench, "time a running server under a load")
    add_serve_options(load)
    engine = _add_command(benches, "engine", run_engine, "time the engine offline, batch by batch")
    add_engine_options(engine)
    completion = add_command("completion", run_completion, "print what completes these commands")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[Parser]", name: str, run: Run, description: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description)
    command.set_defaults(run=run, fail=command.error, refuse_flag=partial(_refuse, command))
    return command


def _refuse(command: argparse.ArgumentParser, word: str) -> None:
    """Leave because of a word that a command does not know."""
    flags = re.findall(r"--[a-z-]+", command.format_usage())
    command.error(f"{word} means nothing here{_meant(word.partition('=')[0], flags)}")


def _meant(word: str, known: Sequence[str]) -> str:
    """Return a question after the one of the known words that is near, if one is."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line; leaves with a line or two when it is wrong."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.refuse_flag(unknown[0])
    return args


def parse(argv: list[str] | None, environment: Environment) -> Command:
    """Parse a command line that loads a model, and fetch the demo model if none is named."""
    return command_of(parse_arguments(argv), environment)


def run_serve(args: argparse.Namespace, environment: Environment) -> int:
    """Serve until told to stop."""
    set_up_logging(args.log_level, args.log_format)
    command = command_of(args, environment)
    from app.main import serve

    return serve(command)


def run_info(args: argparse.Namespace, environment: Environment) -> int:
    """Print what would be loaded."""
    command = command_of(args, environment)
    from app.main import describe

    return describe(command)


def run_generate(args: argparse.Namespace, environment: Environment) -> int:
    """Continue a text."""
    from app.cli import generate

    return generate.run(args, environment)


def run_chat(args: argparse.Namespace, environment: Environment) -> int:
    """Hold a conversation."""
    from app.cli import chat

    return chat.run(args, environment)


def run_completion(args: argparse.Namespace, environment: Environment) -> int:  # noqa: ARG001
    """Print a shell's completion of these very commands."""
    from app.cli.completion import script_for

    sys.stdout.write(script_for(args.shell, build_parser()))
    return 0
