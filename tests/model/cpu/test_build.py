"""Where the native library comes from, and when it is not trusted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.cpu import build
from model.cpu.build import LEVELS, NativeUnavailable, compile_library, find_library, machine_level

ROOT = Path(__file__).resolve().parents[3]


def test_library_is_compiled_once(library_path, monkeypatch):
    cache = library_path.parent.parent
    monkeypatch.setattr(build, "compile_library", None)  # would raise if called
    assert find_library(cache) == library_path
    assert [path.name for path in library_path.parent.iterdir()] == [library_path.name]


def test_changed_source_flags_or_compiler_change_the_name(library_path, monkeypatch):
    level = machine_level()
    names = {
        build.source_hash(level),
        build.source_hash(level, "cc 1"),
        build.source_hash("portable"),
    }
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    names.add(build.source_hash(level))
    assert len(names) == 4 or level == "portable"


def test_without_a_compiler_there_is_a_clear_word(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(NativeUnavailable, match=r"no C compiler found \(no-such-compiler\)"):
        find_library(tmp_path)


def test_compiler_that_fails_is_named_with_its_first_error(library_path, tmp_path, monkeypatch):
    (tmp_path / "broken.c").write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(NativeUnavailable, match="nothing"):
        find_library(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize("what", ["folder", "library"])
def test_library_that_others_can_write_is_not_loaded(library_path, what):
    path = library_path if what == "library" else library_path.parent
    mode = path.stat().st_mode
    path.chmod(mode | 0o022)
    try:
        with pytest.raises(NativeUnavailable, match="written by others"):
            find_library(library_path.parent.parent)
    finally:
        path.chmod(mode)


def test_folder_that_cannot_be_written_is_named(library_path, tmp_path):
    (tmp_path / "native").write_text("a file in the way")
    with pytest.raises(NativeUnavailable, match="native"):
        find_library(tmp_path)


def test_prebuilt_library_is_taken_before_any_compiler(library_path, tmp_path, monkeypatch):
    level = machine_level()
    prebuilt = tmp_path / f"arriero-{level}-{build.source_hash(level)}.so"
    prebuilt.write_bytes(library_path.read_bytes())
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "COMPILERS", ())
    assert find_library(tmp_path / "unused") == prebuilt


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_compiles_without_a_warning(level, library_path, tmp_path):
    if machine_level() == "portable" and level != "portable":
        pytest.skip("not an x86 compiler")
    compile_library("cc", level, tmp_path / "library.so", ("-Werror",))
    assert (tmp_path / "library.so").stat().st_size > 10_000


@pytest.mark.parametrize("level", [name for name in LEVELS if name != machine_level()])
def test_lower_levels_give_the_same_answers(level, library_path, tmp_path):
    """Every operation again, in a process of its own, through what lesser machines run."""
    if list(LEVELS).index(level) < list(LEVELS).index(machine_level()):
        pytest.skip("this machine has no such instructions")
    run_operations(find_library(tmp_path, level), {})


def test_avx512_level_gives_the_same_answers_through_emulated_instructions(library_path, tmp_path):
    if machine_level() == "portable":
        pytest.skip("not an x86 compiler")
    header = Path(__file__).with_name("emulated_avx512.h")
    library = tmp_path / "emulated.so"
    compile_library("cc", "avx2", library, ("-include", str(header), "-Wno-psabi"))
    run_operations(library, {})


def test_operations_are_clean_under_sanitizers(library_path, tmp_path):
    runtime = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    library = tmp_path / "sanitized.so"
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    compile_library("cc", machine_level(), library, flags)
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    run_operations(library, environment)


def run_operations(library: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.cpu.smoke", str(library)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all equal"
