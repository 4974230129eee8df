"""The tree of commands: `arriero serve`, `arriero info` and so on; a test freezes its flags.

Each command is a parser with a function to run, `(args, environment) -> exit code`. What those
functions need is imported when they run: `--help` should not cost the second that torch takes.
"""

import argparse
from collections.abc import Callable

from app.cli.command import Command, command_of
from app.cli.options import add_model_options, add_server_options
from app.logs import set_up_logging
from app.settings import Environment

Run = Callable[[argparse.Namespace, Environment], int]
"""Run a command; returns the exit code. Raises ModelError for what the user got wrong."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="arriero", description="Serve LLaMA-family models, or talk to one."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, run: Run, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(run=run, fail=command.error)
        return command

    serve = add_command("serve", run_serve, "load a model and serve OpenAI's API")
    add_model_options(serve)
    add_server_options(serve)
    info = add_command("info", run_info, "say what would be loaded, and the memory plan")
    add_model_options(info)
    return parser


def parse(argv: list[str] | None, environment: Environment) -> Command:
    """Parse a command line that loads a model; leaves with a usage line when it is wrong."""
    return command_of(build_parser().parse_args(argv), environment)


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
