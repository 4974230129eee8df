"""Completion scripts: they know every flag, and bash does what they say."""

import shutil
import subprocess

import pytest

from app.cli import build_parser
from app.cli.completion import entries_of, script_for


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_flag_is_known(shell):
    script = script_for(shell, build_parser()).replace("-l ", "--")  # as fish writes them
    for entry in entries_of(build_parser()):
        assert entry.name.split()[-1] in script
        for flag in entry.flags:
            assert flag.names[0] in script or flag.names[-1] in script


def complete(*words: str) -> list[str]:
    """What bash offers for the last word of a line."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script_for('bash', build_parser())}\n"
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _arriero; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-uc", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["arriero", "ser"], ["serve"]),
        (["arriero", "serve", "--max-num-s"], ["--max-num-seqs"]),
        (["arriero", "serve", "--load-format", "g"], ["gguf"]),
        (["arriero", "completion", ""], ["bash", "zsh", "fish"]),
        (["arriero", "chat", "--sys"], ["--system"]),
        (["arriero", "info", "--sys"], []),
        (["arriero", "nothing", "--x"], []),
        (["arriero", "bench", "e"], ["engine"]),
        (["arriero", "bench", "engine", "--batch-s"], ["--batch-size"]),
        (["arriero", "bench", "engine", "--load-format", "du"], ["dummy"]),
        (["arriero", "bench", "--batch"], []),
    ],
)
def test_bash_completes(words, offers):
    assert complete(*words) == offers


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_shell_reads_its_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    path = tmp_path / "script"
    path.write_text(script_for(shell, build_parser()))
    subprocess.run([shell, "-n", path], check=True)
