"""The command line: a module a command, flags by theme, vLLM's names where it has the flag."""

import os
import sys
from typing import NoReturn

from app.cli.command import Command, voice_of
from app.cli.errors import RequestFailed
from app.cli.parser import build_parser, parse, parse_arguments
from app.cli.values import parse_speculation
from app.settings import read_environment
from model.errors import ModelError

__all__ = ["Command", "build_parser", "main", "parse", "parse_speculation"]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command; what the user got wrong is one line and exit code 1."""
    args = parse_arguments(argv)
    try:
        sys.exit(args.run(args, read_environment()))
    except BrokenPipeError:
        # Whoever read the output has left; closing it would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ModelError, RequestFailed, OSError) as error:
        voice_of(args)(f"arriero: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
