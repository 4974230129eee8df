"""`arriero completion SHELL`: completion scripts, written from the tree of commands itself.

Knows nothing of what a command does: its name, flags, their choices and their help are all here.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag as a shell needs it."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command, its flags and the words that may stand alone in it; without any, a file may.

    The name of a command inside of another is both words: "bench serve".
    """

    name: str
    help: str
    flags: tuple[Flag, ...]
    words: tuple[str, ...]


def script_for(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the script that completes `arriero` in a shell."""
    writers: Mapping[str, Callable[[list[Entry]], str]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    return writers[shell](entries_of(parser))


def entries_of(parser: argparse.ArgumentParser) -> list[Entry]:
    """Read the commands out of a parser; argparse has no public way to ask."""
    return [
        entry
        for name, command in _commands_of(parser).items()
        for entry in (
            _entry_of(name, command),
            *(_entry_of(f"{name} {inner}", each) for inner, each in _commands_of(command).items()),
        )
    ]


def _commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    choices: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            choices |= action.choices
    return choices


def _outer(entries: list[Entry]) -> list[Entry]:
    """Return the commands that are a word alone."""
    return [entry for entry in entries if " " not in entry.name]


def _outer_of_pairs(entries: list[Entry]) -> str:
    """Return the words that a second one belongs to, as a pattern of shells."""
    return "|".join(sorted({entry.name.split()[0] for entry in entries if " " in entry.name}))


def _entry_of(name: str, command: argparse.ArgumentParser) -> Entry:
    flags: list[Flag] = []
    words: list[str] = []
    for action in command._actions:
        choices = tuple(str(choice) for choice in action.choices or ())
        if not action.option_strings:
            words += choices
            continue
        flags.append(
            Flag(
                names=tuple(action.option_strings),
                help=action.help or "",
                takes_value=action.nargs != 0,
                choices=choices,
            )
        )
    return Entry(name=name, help=command.description or "", flags=tuple(flags), words=tuple(words))


def _quoted(text: str) -> str:
    """Quote for bash, zsh and fish alike."""
    return "'" + text.replace("\\", "").replace("'", "’") + "'"


def _bash(entries: list[Entry]) -> str:
    cases = []
    for entry in entries:
        values = "".join(
            f"      {'|'.join(flag.names)}) words='{' '.join(flag.choices)}'; is_value=1 ;;\n"
            for flag in entry.flags
            if flag.takes_value
        )
        names = " ".join(name for flag in entry.flags for name in flag.names)
        cases.append(
            f"    {_quoted(entry.name)})\n"
            f'      case "$previous" in\n{values}      esac\n'
            f"      flags='{names}' alone='{' '.join(entry.words)}' ;;\n"
        )
    commands = " ".join(entry.name for entry in _outer(entries))
    return f"""\
# eval "$(arriero completion bash)" in ~/.bashrc
_arriero() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local words='' flags='' alone='' is_value='' command="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{commands}' -- "$word"))
    return
  fi
  if [ "$COMP_CWORD" -gt 2 ]; then
    case "$command" in
      {_outer_of_pairs(entries)}) command="$command ${{COMP_WORDS[2]}}" ;;
    esac
  fi
  case "$command" in
{"".join(cases)}    *) return ;;
  esac
  if [ -z "$is_value" ]; then
    case "$word" in
      -*) words="$flags" ;;
      *) words="$alone" ;;
    esac
  fi
  if [ -n "$words" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$word"))
  else
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -F _arriero arriero
"""


def _zsh(entries: list[Entry]) -> str:
    def spec(flag: Flag, name: str) -> str:
        text = flag.help.replace("[", "(").replace("]", ")").replace(":", ";")
        action = f"({' '.join(flag.choices)})" if flag.choices else "_files"
        return _quoted(f"*{name}[{text}]" + (f":value:{action}" if flag.takes_value else ""))

    cases = []
    for entry in entries:
        alone = f"({' '.join(entry.words)})" if entry.words else "_files"
        specs = [spec(flag, name) for flag in entry.flags for name in flag.names]
        lines = " \\\n        ".join([*specs, f"'*:word:{alone}'"])
        cases.append(f"    {_quoted(entry.name)})\n      _arguments \\\n        {lines} ;;\n")
    commands = "\n".join(
        f"    {_quoted(entry.name + ':' + entry.help.replace(':', ';'))}"
        for entry in _outer(entries)
    )
    return f"""\
# eval "$(arriero completion zsh)" in ~/.zshrc, after compinit
_arriero() {{
  local -a commands
  commands=(
{commands}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  if (( CURRENT > 2 )); then
    case "$command" in
      {_outer_of_pairs(entries)}) command="$command $words[2]"; shift words; (( CURRENT-- )) ;;
    esac
  fi
  case "$command" in
{"".join(cases)}  esac
}}
compdef _arriero arriero
"""


def _fish(entries: list[Entry]) -> str:
    lines = [
        "# arriero completion fish | source     in ~/.config/fish/config.fish",
        "set -l seen __fish_seen_subcommand_from",
    ]
    for entry in entries:
        outer, _, inner = entry.name.partition(" ")
        if not inner:
            lines.append(
                f"complete -c arriero -n __fish_use_subcommand -f -a {entry.name} "
                f"-d {_quoted(entry.help)}"
            )
        is_inner = f"; and $seen {inner}" if inner else ""
        seen = f'complete -c arriero -n "$seen {outer}{is_inner}"'
        if entry.words:
            lines.append(f"{seen} -f -a '{' '.join(entry.words)}'")
        for flag in entry.flags:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in flag.names
            )
            value = " -r" if flag.takes_value else ""
            if flag.choices:
                value = f" -x -a '{' '.join(flag.choices)}'"
            lines.append(f"{seen} {names} -d {_quoted(flag.help)}{value}")
    return "\n".join(lines) + "\n"
